"""Rows picked by index: the head works on the rows that have a target only."""

from __future__ import annotations

from lora.shaders.activations import activation, check_shape
from lora.shaders.program import Program
from lora.shaders.tensor import Extent, Tensor


def gather_rows(
    program: Program,
    x: Tensor,
    indices: Tensor,
    extent: Extent,
    *,
    out: Tensor | None = None,
    scale: float = 1.0,
    label: str = "gather",
) -> Tensor:  # [extent.maximum, width]
    """Appends y[s] = scale · x[indices[s]], or zeros where indices[s] is NO_ROW.

    Args:
        x: [any rows, width].
        indices: u32 [extent.maximum].
        extent: how many rows of the output are in use.
        out: where to write; a new tensor by default.
    """
    width = x.shape[1]
    check_shape("gather indices", indices, extent.maximum)
    if width % 4:
        raise ValueError(f"gather: width {width} is no multiple of 4")
    y = out if out is not None else activation(program, extent, width)
    check_shape("gather output", y, extent.maximum, width)
    program.dispatch(
        "gather",
        {"width": width, "scale": scale},
        [extent.uniform, x, indices, y],
        -(-extent.maximum * width // 256),
        label=label,
    )
    return y
