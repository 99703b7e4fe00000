"""Gradient of causal convolutions (their weights are frozen)."""

from __future__ import annotations

from lora.forward.causal_conv import Convolution
from lora.shaders.activations import check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


def causal_conv_backward(
    program: Program, x: Tensor, convolution: Convolution, segments: Tensor, d_y: Tensor,
    d_x: Tensor,
) -> None:  # fmt: skip
    """Appends the gradient of `causal_conv` to x.

    Args:
        program: what the dispatch is appended to.
        x, convolution, segments: as in the forward.
        d_y: [rows, width], f32 or f16.
        d_x: shaped as x, f32 or f16, and not x; columns that aren't read are left alone.
    """
    check_shape("causal_conv_backward segments", segments, x.shape[0], 2)
    check_shape("causal_conv_backward d_y", d_y, x.shape[0], convolution.width)
    check_shape("causal_conv_backward d_x", d_x, *x.shape)
    extent = extent_of(x)
    program.dispatch(
        "causal_conv_backward",
        convolution.constants(x) | {"d_y_type": d_y.dtype, "d_x_type": d_x.dtype},
        [extent.uniform, x, convolution.weight, segments, d_y, d_x],
        -(-extent.maximum * convolution.width // 256),
    )
