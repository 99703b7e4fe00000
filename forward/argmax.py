"""The most likely token of each row, so that greedy text reads back one number."""

from __future__ import annotations

from lora.shaders.activations import check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor

_STEPS = 4  # quads of columns that a lane loads at once


def argmax(program: Program, x: Tensor, out: Tensor, *, length: int) -> None:
    """Appends out[m] = the place of the largest of x[m, :length], the lowest of equal ones.

    Args:
        x: [rows, length or more], a multiple of 4 columns.
        out: u32 [rows].
        length: columns that count: a vocabulary without its padding.
    """
    extent = extent_of(x)
    check_shape("argmax output", out, x.shape[0])
    if not 0 < length <= x.shape[1] or out.dtype != "u32":
        raise ValueError(f"argmax: {length} columns of {x.shape} into {out.dtype} {out.shape}")
    if x.shape[1] % 4:
        raise ValueError(f"argmax: {x.shape[1]} columns are no multiple of 4")
    constants = {"length": length, "stride": x.shape[1], "steps": _STEPS}
    program.dispatch("argmax", constants, [extent.uniform, x, out], extent.maximum)
