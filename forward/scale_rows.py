"""Columns of rows multiplied by a number: one for all rows, or each row's by its position."""

from __future__ import annotations

from lora.shaders.activations import check_f32, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


def scale_rows(
    program: Program,
    x: Tensor,
    factors: Tensor,
    positions: Tensor | None = None,
    *,
    n_columns: int | None = None,
    label: str = "scale_rows",
) -> None:
    """Appends x[m, i] ← x[m, i] · factor for the first columns, in place; its own gradient.

    Args:
        program: what the dispatch is appended to.
        x: [rows, width], f32 or f16.
        factors: f32 [n]; without positions the first is that of all rows.
        positions: u32 [rows], each row's place in factors.
        n_columns: how many columns; all by default.
        label: of the dispatch.
    """
    width = x.shape[1]
    columns = width if n_columns is None else n_columns
    check_f32("scale_rows", factors=factors)
    if columns % 4 or width % 4 or columns > width:
        raise ValueError(f"scale_rows: {columns} of {width} columns: not by 4, or too many")
    if positions is not None:
        check_shape("scale_rows positions", positions, x.shape[0])
    extent = extent_of(x)
    program.dispatch(
        "scale_rows",
        {
            "x_type": x.dtype,
            "stride": width,
            "quads": columns // 4,
            "placed": positions is not None,
        },
        [extent.uniform, x, factors, *([] if positions is None else [positions])],
        -(-extent.maximum * columns // 256),
        label=label,
    )
