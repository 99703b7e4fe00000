"""Products of a few rows with frozen quantized matrices: as fast as the weights can be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from forward.activations import activation, check_shape, extent_of
from forward.adapter import LoraFactors
from forward.matmul import adapted_members
from forward.weights import FrozenMatrix
from shaders.program import Program
from shaders.tensor import Tensor

MAX_ROWS = 4  # rows whose sums a lane holds beside each other
_CPU_LANES = 32
# Of a GPU. Its memory answers after half a microsecond or more: 4 TB/s need some 3 MB of loads on
# their way, which no few thousand lanes with a word or two each make.
_LANES = 64  # of a workgroup whose sums few lanes share
_MOST_LANES = 256  # that share the sums of a quad of columns
_LANES_WANTED = 2**17  # in one dispatch: a thousand for each multiprocessor of a large GPU
_EIGHTS_AT_ONCE = 4  # eights × rows of x that a lane loads before it uses the first of them
_BRANCHES = 8  # sums that a lane adds between two barriers


@dataclass(frozen=True)
class RowTiling:
    """How the lanes of `matmul_row` divide a product.

    Attributes:
        lanes: of a workgroup.
        share: lanes that share the sums of four columns.
        steps: eights of the contraction that a lane loads at once.
    """

    lanes: int
    share: int
    steps: int


def choose_tiling(is_cpu: bool, rows: int, columns: int, contraction: int) -> RowTiling:
    """How to divide a product of `rows` rows: as many lanes as keep a GPU's memory busy.

    All the columns of a matrix decide, so that the results do not depend on its parts.
    """
    # A CPU adapter runs lanes of one workgroup in turn and pays for barriers: no lane shares.
    if is_cpu:
        return RowTiling(_CPU_LANES, 1, 1)
    share = _MOST_LANES
    # Past the lanes wanted, more of them only have more sums to add up.
    while share > _LANES and columns // 4 * share // 2 >= _LANES_WANTED:
        share //= 2
    while share > 8 and contraction < 16 * share:  # two eights a lane or more
        share //= 2
    eights = max(1, contraction // 8 // share)
    return RowTiling(max(share, _LANES), share, min(max(1, _EIGHTS_AT_ONCE // rows), eights))


def matmul_row(
    program: Program,
    x: Tensor,
    matrix: FrozenMatrix,
    *,
    lora: LoraFactors | None = None,
    z: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    label: str = "matmul",
) -> Tensor:  # [rows, out_features]
    """Appends y = cap(x · Wᵀ + scale · z · Bᵀ + bias) + residual for up to MAX_ROWS rows.

    Reads every weight once, whatever the rows. Arguments as those of `forward.matmul.matmul`.
    """
    extent = extent_of(x)
    check_shape("matmul_row input", x, None, matrix.in_features)
    if extent.maximum > MAX_ROWS:
        raise ValueError(f"{label}: matmul_row takes up to {MAX_ROWS} rows, not {extent.maximum}")
    if bias is not None:
        check_shape("matmul_row bias", bias, matrix.out_features)
    if residual is not None:
        check_shape("matmul_row residual", residual, x.shape[0], matrix.out_features)
    y = out if out is not None else activation(program, extent, matrix.out_features)
    check_shape("matmul_row output", y, x.shape[0], matrix.out_features)
    if matrix.in_features % 4 or (lora is not None and lora.rank % 4):
        raise ValueError(f"{label}: widths must be multiples of 4: {x.shape}")
    tiling = choose_tiling(
        program.device.is_cpu, extent.maximum, matrix.out_features, matrix.in_features
    )
    for part in matrix.parts:
        if part.n_rows % 4 or part.first_row % 4:
            raise ValueError(f"{label}: parts must be whole quads of rows: {part.words.shape}")
        members = adapted_members(lora, part)
        constants: dict[str, Any] = {
            "quantization": part.quantization.name,
            "contraction": matrix.in_features,
            "weight_columns": matrix.in_features,
            "n_columns": part.n_rows,
            "row_words": part.words.shape[1],
            "x_stride": x.shape[1],
            "out_stride": matrix.out_features,
            "placed": len(matrix.parts) > 1,
            "members": members,
            "rank": lora.rank if lora else 0,
            "low_stride": z.shape[1] if members and z is not None else 0,
            "scale": lora.scale if lora else 1.0,
            "epilogue": "write" if residual is None else "residual",
            "bias": bias is not None,
            "softcap": softcap,
            "lane_rows": extent.maximum,
            "lanes": tiling.lanes,
            "share": tiling.share,
            "steps": tiling.steps,
            "branches": _BRANCHES,
        }
        tensors = [extent.uniform, x, part.words, y]
        if members and lora is not None:
            if z is None:
                raise ValueError(f"{label}: an adapted matrix needs z and its factors")
            tensors += [z, lora.b]
        tensors += [tensor for tensor in (residual, bias) if tensor is not None]
        if len(matrix.parts) > 1:
            tensors.append(program.device.constant_uniform((0, part.first_row)))
        terms = matrix.in_features + (lora.rank if lora and members else 0)
        program.dispatch(
            "matmul_row",
            constants,
            tensors,
            -(-part.n_rows // 4 * tiling.share // tiling.lanes),
            label=label,
            flops=2 * extent.maximum * part.n_rows * terms,
        )
    return y
