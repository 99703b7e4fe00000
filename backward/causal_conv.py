"""Gradient of causal convolutions (their weights are frozen)."""

from __future__ import annotations

from dataclasses import dataclass

from lora.backward.before import SourceBefore
from lora.forward.causal_conv import Convolution, causal_conv
from lora.forward.plans.stretches import Stretches
from lora.shaders.activations import check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


@dataclass(frozen=True)
class ConvolutionBefore(SourceBefore):
    """A gated convolution before a product; attributes as arguments of `causal_conv_backward`."""

    x: Tensor
    convolution: Convolution
    segments: Tensor
    d_x: Tensor

    def record(self, program: Program, product: Tensor, stretches: Stretches | None = None) -> None:
        """See `SourceBefore`."""
        causal_conv_backward(
            program, self.x, self.convolution, self.segments, product, self.d_x, y=self.again
        )

    def repeat(self, program: Program, out: Tensor) -> None:
        """See `SourceBefore`."""
        causal_conv(program, self.x, self.convolution, self.segments, out)


def causal_conv_backward(
    program: Program, x: Tensor, convolution: Convolution, segments: Tensor, d_y: Tensor,
    d_x: Tensor, *, y: Tensor | None = None,
) -> None:  # fmt: skip
    """Appends the gradient of `causal_conv` to x.

    Args:
        program: what the dispatch is appended to.
        x, convolution, segments: as in the forward.
        d_y: [rows, width], f32 or f16.
        d_x: shaped as x, f32 or f16, and not x; columns that aren't read are left alone.
        y: [rows, width], f32 or f16; where given, what a gated convolution gave is written there
            again, to the bits of `causal_conv`.
    """
    check_shape("causal_conv_backward segments", segments, x.shape[0], 2)
    check_shape("causal_conv_backward d_y", d_y, x.shape[0], convolution.width)
    check_shape("causal_conv_backward d_x", d_x, *x.shape)
    extent = extent_of(x)
    tensors = [extent.uniform, x, convolution.weight, segments, d_y, d_x]
    if y is not None:
        if not convolution.gated:
            raise ValueError("causal_conv_backward: y is written again of gated convolutions only")
        check_shape("causal_conv_backward y", y, *d_y.shape)
        tensors.append(y)
    types = {
        "d_y_type": d_y.dtype, "d_x_type": d_x.dtype, "y_type": None if y is None else y.dtype
    }  # fmt: skip
    program.dispatch(
        "causal_conv_backward",
        convolution.constants(x) | types,
        tensors,
        -(-extent.maximum * convolution.width // 256),
    )
