"""Gradient of the output gate of attention."""

from __future__ import annotations

from lora.forward.head_gate import gate_constants
from lora.shaders.activations import check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


def head_gate_backward(
    program: Program, raw: Tensor, x: Tensor, head_size: int, d: Tensor, d_raw: Tensor
) -> None:
    """Appends the gradients of `head_gate` to x, in place, and to the gates.

    Args:
        program, raw, x, head_size: as in the forward.
        d: shaped as x, f32 or f16: the gradient to what came out, which becomes that to x.
        d_raw: shaped as raw, f32 or f16; only the gates' columns are written.
    """
    check_shape("head_gate_backward d", d, *x.shape)
    check_shape("head_gate_backward d_raw", d_raw, *raw.shape)
    extent = extent_of(x)
    program.dispatch(
        "head_gate_backward",
        gate_constants(raw, x, head_size) | {"d_type": d.dtype, "d_raw_type": d_raw.dtype},
        [extent.uniform, raw, x, d, d_raw],
        -(-extent.maximum * x.shape[1] // 256),
    )
