"""Products with frozen quantized matrices, the low-rank part included."""

from __future__ import annotations

from typing import Any

from forward.activations import activation, check_shape, extent_of
from forward.adapter import LoraFactors
from forward.weights import FrozenMatrix, MatrixPart
from shaders.program import Program
from shaders.tensor import Extent, Tensor

WIDE_ROWS = 12  # rows a lane of matmul_wide holds; see docs/log.md for what was measured
WIDE_LANES = 32


def matmul(
    program: Program,
    x: Tensor,
    matrix: FrozenMatrix,
    *,
    lora: LoraFactors | None = None,
    z: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    label: str = "matmul",
) -> Tensor:  # [rows, out_features]
    """Appends y = x · Wᵀ + scale · z · Bᵀ + residual, decoding W inside the kernel's tiles.

    The low-rank part is a few more steps of the same contraction (Hu et al. 2021, "LoRA").

    Args:
        x: [rows, in_features].
        matrix: W [out_features, in_features].
        lora: the factors of the adapted members of W, or None.
        z: [rows, members · rank] = x · Aᵀ, needed with `lora`.
        residual: [rows, out_features], added where given; not the tensor `out`.
        out: where to write; a new tensor by default.
    """
    extent = extent_of(x)
    check_shape("matmul input", x, None, matrix.in_features)
    y = out if out is not None else activation(program, extent, matrix.out_features)
    check_shape("matmul output", y, x.shape[0], matrix.out_features)
    for part in matrix.parts:
        record_product(
            program,
            extent,
            x,
            part,
            y,
            transposed=False,
            contraction=matrix.in_features,
            x_column=0,
            out_column=part.first_row,
            members=_members(lora, part),
            low=z,
            factor=lora.b if lora else None,
            rank=lora.rank if lora else 0,
            scale=lora.scale if lora else 1.0,
            residual=residual,
            epilogue="write" if residual is None else "residual",
            label=label,
        )
    return y


def _members(lora: LoraFactors | None, part: MatrixPart) -> list[dict[str, int]]:
    """The adapted ranges inside a part: columns of the part, columns of z, rows of B."""
    members = []
    factor_row = 0
    for index, (start, stop) in enumerate(lora.ranges if lora else ()):
        first = max(start, part.first_row)
        last = min(stop, part.first_row + part.n_rows)
        if first < last:
            members.append(
                {
                    "start": first - part.first_row,
                    "stop": last - part.first_row,
                    "low_start": index * lora.rank if lora else 0,
                    "factor_start": factor_row + first - start,
                }
            )
        factor_row += stop - start
    return members


def record_product(
    program: Program,
    extent: Extent,
    x: Tensor,
    part: MatrixPart,
    out: Tensor,
    *,
    transposed: bool,
    contraction: int,
    x_column: int,
    out_column: int,
    members: list[dict[str, int]],
    low: Tensor | None,
    factor: Tensor | None,
    rank: int,
    scale: float,
    residual: Tensor | None,
    epilogue: str,
    label: str,
) -> None:
    """Appends the dispatch for one part; `backward/matmul.py` uses it with transposed=True.

    transposed=False: out[m, n] = Σ_k x[m, k] · W[n, k] + scale · Σ_r low[m, r] · factor[n, r].
    transposed=True:  out[m, k] = Σ_n x[m, n] · W[n, k] + Σ_r low[m, r] · factor[r, k].
    """
    n_columns = part.n_rows if not transposed else out.shape[1]
    if contraction % 4 or n_columns % 4 or x.shape[1] % 4 or rank % 4:
        raise ValueError(f"{label}: widths must be multiples of 4: {x.shape}, {out.shape}, {rank}")
    constants: dict[str, Any] = {
        "quantization": part.quantization.name,
        "transposed": transposed,
        "contraction": contraction,
        "n_columns": n_columns,
        "row_words": part.words.shape[1],
        "x_stride": x.shape[1],
        "x_column": x_column,
        "out_stride": out.shape[1],
        "out_column": out_column,
        "members": members,
        "rank": rank,
        "low_stride": low.shape[1] if members and low is not None else 0,
        "scale": scale,
        "epilogue": epilogue,
    }
    tensors = [extent.uniform, x, part.words, out]
    if members:
        if low is None or factor is None:
            raise ValueError(f"{label}: an adapted matrix needs z and its factors")
        tensors += [low, factor]
    if residual is not None:
        tensors.append(residual)
    constants |= {"lane_rows": WIDE_ROWS, "lanes": WIDE_LANES, "maximum_rows": extent.maximum}
    grid = (-(-n_columns // (8 * WIDE_LANES)), -(-extent.maximum // WIDE_ROWS), 1)
    flops = 2 * extent.maximum * n_columns * (contraction + len(members) * rank)
    program.dispatch("matmul_wide", constants, tensors, grid, label=label, flops=flops)
