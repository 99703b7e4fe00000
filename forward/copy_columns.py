"""Columns of rows copied, or added, into columns of other rows."""

from __future__ import annotations

from lora.shaders.activations import check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


def copy_columns(
    program: Program,
    x: Tensor,
    x_first: int,
    y: Tensor,
    y_first: int,
    n_columns: int,
    *,
    accumulate: bool = False,
    label: str = "copy_columns",
) -> None:
    """Appends y[m, y_first + i] = x[m, x_first + i] for i < n_columns; numbers are multiples of 4.

    Args:
        program: what the dispatch is appended to.
        x: [rows, any width], f32 or f16.
        x_first: the first column that is read.
        y: [rows, any width], f32 or f16; not x. Its other columns are left alone.
        y_first: the first column that is written.
        n_columns: how many.
        accumulate: add to y.
        label: of the dispatch.
    """
    check_shape("copy_columns y", y, x.shape[0], None)
    sizes = (x.shape[1], y.shape[1], x_first, y_first, n_columns)
    if any(size % 4 for size in sizes):
        raise ValueError(f"copy_columns: {sizes} are not all multiples of 4")
    if x_first + n_columns > x.shape[1] or y_first + n_columns > y.shape[1]:
        raise ValueError(f"copy_columns: {n_columns} columns do not fit {x.shape} and {y.shape}")
    extent = extent_of(x)
    constants = {
        "x_type": x.dtype,
        "y_type": y.dtype,
        "x_stride": x.shape[1] // 4,
        "y_stride": y.shape[1] // 4,
        "x_first": x_first // 4,
        "y_first": y_first // 4,
        "quads": n_columns // 4,
        "accumulate": accumulate,
    }
    n_groups = -(-extent.maximum * n_columns // 256)
    program.dispatch("copy_columns", constants, [extent.uniform, x, y], n_groups, label=label)
