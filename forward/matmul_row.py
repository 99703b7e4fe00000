"""Products of a few rows with frozen quantized matrices: as fast as the weights can be read."""

from __future__ import annotations

from typing import Any

from forward.activations import activation, check_shape, extent_of
from forward.adapter import LoraFactors
from forward.matmul import _members
from forward.weights import FrozenMatrix
from shaders.program import Program
from shaders.tensor import Tensor

MAX_ROWS = 4  # rows whose sums a lane holds beside each other
_LANES = 64
_CPU_LANES = 32


def choose_share(contraction: int) -> int:
    """How many lanes of a GPU share the sums of four columns.

    A power of two that leaves each lane two eights of the contraction or more.
    """
    share = _LANES
    while share > 8 and contraction < 16 * share:
        share //= 2
    return share


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
    # A CPU adapter runs lanes of one workgroup in turn and pays for barriers: no lane shares.
    if program.device.is_cpu:
        lanes, share = _CPU_LANES, 1
    else:
        lanes, share = _LANES, choose_share(matrix.in_features)
    for part in matrix.parts:
        if part.n_rows % 4 or part.first_row % 4:
            raise ValueError(f"{label}: parts must be whole quads of rows: {part.words.shape}")
        members = _members(lora, part)
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
            "lanes": lanes,
            "share": share,
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
            -(-part.n_rows // 4 * share // lanes),
            label=label,
            flops=2 * extent.maximum * part.n_rows * terms,
        )
    return y
