"""Gradient of the output gate of attention."""

from __future__ import annotations

from dataclasses import dataclass

from lora.backward.before import SourceBefore
from lora.forward.head_gate import gate_constants, head_gate
from lora.forward.plans.stretches import Stretches
from lora.shaders.activations import check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


@dataclass(frozen=True)
class HeadGateBefore(SourceBefore):
    """The output gate before a product; attributes as arguments of `head_gate_backward`."""

    raw: Tensor
    x: Tensor
    head_size: int
    d_raw: Tensor

    def record(self, program: Program, product: Tensor, stretches: Stretches | None = None) -> None:
        """See `SourceBefore`; `product` becomes the gradient to x."""
        head_gate_backward(
            program, self.raw, self.x, self.head_size, product, self.d_raw, gated=self.again
        )

    def repeat(self, program: Program, out: Tensor) -> None:
        """See `SourceBefore`."""
        head_gate(program, self.raw, self.x, self.head_size, out=out)


def head_gate_backward(
    program: Program, raw: Tensor, x: Tensor, head_size: int, d: Tensor, d_raw: Tensor,
    *, gated: Tensor | None = None,
) -> None:  # fmt: skip
    """Appends the gradients of `head_gate` to x, in place, and to the gates.

    Args:
        program, raw, x, head_size: as in the forward.
        d: shaped as x, f32 or f16: the gradient to what came out, which becomes that to x.
        d_raw: shaped as raw, f32 or f16; only the gates' columns are written.
        gated: shaped as x, f32 or f16; where given, what the forward gave is written there again,
            to the bits of `head_gate`.
    """
    check_shape("head_gate_backward d", d, *x.shape)
    check_shape("head_gate_backward d_raw", d_raw, *raw.shape)
    extent = extent_of(x)
    tensors = [extent.uniform, raw, x, d, d_raw]
    if gated is not None:
        check_shape("head_gate_backward gated", gated, *x.shape)
        tensors.append(gated)
    types = {
        "d_type": d.dtype, "d_raw_type": d_raw.dtype,
        "gated_type": None if gated is None else gated.dtype,
    }  # fmt: skip
    program.dispatch(
        "head_gate_backward",
        gate_constants(raw, x, head_size) | types,
        tensors,
        -(-extent.maximum * x.shape[1] // 256),
    )
