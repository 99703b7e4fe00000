"""Gradient of the norms of groups of columns (their weights are frozen)."""

from __future__ import annotations

from collections.abc import Sequence

from lora.forward.span_norm import Span, span_constants
from lora.shaders.activations import check_f32, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


def span_norm_backward(
    program: Program,
    x: Tensor,
    weights: Tensor,
    epsilon: float,
    spans: Sequence[Span],
    d_y: Tensor,
    d_x: Tensor,
    *,
    accumulate: bool = False,
) -> None:
    """Appends the gradient of `span_norm` to x.

    Args:
        program: what the dispatch is appended to.
        x, weights, epsilon, spans: as in the forward.
        d_y: shaped as the forward's output, f32 or f16.
        d_x: [rows, any width], columns as in x, f32 or f16; d_y itself where these stay where they
            are. Columns outside the spans are left alone.
        accumulate: add to d_x.
    """
    in_place = d_x is d_y
    check_f32("span_norm_backward", weights=weights)
    check_shape("span_norm_backward d_x", d_x, x.shape[0], None)
    span_constants(program.recording, d_x.shape[1], d_y.shape[1], epsilon, spans)  # checks them
    check_shape("span_norm_backward d_y", d_y, x.shape[0], None)
    moved = any(span.source != span.target or span.step != span.size for span in spans)
    if in_place and (moved or accumulate):
        raise ValueError("span_norm_backward: in place, no span moves and nothing is added up")
    extent = extent_of(x)
    constants = span_constants(program.recording, x.shape[1], d_y.shape[1], epsilon, spans)
    constants["d_stride"] = d_x.shape[1]
    types = {"x_type": x.dtype, "d_x_type": d_x.dtype, "d_y_type": d_y.dtype}
    program.dispatch(
        "span_norm_backward",
        constants | types | {"in_place": in_place, "accumulate": accumulate},
        [extent.uniform, x, weights, d_x, *([] if in_place else [d_y])],
        extent.maximum * sum(span.count for span in spans),
    )
