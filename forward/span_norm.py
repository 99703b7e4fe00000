"""RMSNorm of groups of columns, in stretches of a row: the whole width of q, heads of v."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora.forward.rmsnorm import row_lanes
from lora.shaders.activations import check_f32, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor


@dataclass(frozen=True)
class Span:
    """Groups of columns side by side, each normed on its own, under one weight.

    Attributes:
        count: how many groups.
        size: columns of a group, a multiple of 4.
        source: first column in what is normed.
        target: first column in what comes out.
        weight: where its weight begins among those of all spans; None for a weight of 1.
        normed: False for columns that are taken as they are.
        stride: columns from one group to the next in what is normed; their size by default.
    """

    count: int
    size: int
    source: int
    target: int
    weight: int | None
    normed: bool = True
    stride: int | None = None

    @property
    def step(self) -> int:
        """Columns from one group to the next in what is normed."""
        return self.size if self.stride is None else self.stride


def span_norm(
    program: Program, x: Tensor, weights: Tensor, epsilon: float, spans: Sequence[Span], out: Tensor
) -> None:
    """Appends y = x / sqrt(mean(x²) + epsilon) · weight, over each group of columns.

    Args:
        program: what the dispatch is appended to.
        x: [rows, any width], f32 or f16.
        weights: f32, the spans' one after another.
        epsilon: added to the mean square.
        spans: what is normed; other columns of `out` are left alone.
        out: [rows, any width], f32 or f16; not x.
    """
    check_f32("span_norm", weights=weights)
    check_shape("span_norm output", out, x.shape[0], None)
    extent = extent_of(x)
    constants = span_constants(program.recording, x.shape[1], out.shape[1], epsilon, spans)
    program.dispatch(
        "span_norm",
        constants | {"x_type": x.dtype, "y_type": out.dtype},
        [extent.uniform, x, weights, out],
        extent.maximum * sum(span.count for span in spans),
    )


def span_constants(
    recording: Recording, x_stride: int, y_stride: int, epsilon: float, spans: Sequence[Span]
) -> dict[str, Any]:
    """The template constants that forward and backward share, once the spans fit."""
    for span in spans:
        numbers = (
            *(span.size, span.step, span.source, span.target, span.weight or 0),
            *(x_stride, y_stride),
        )
        if any(number % 4 for number in numbers):
            raise ValueError(f"span_norm: {span} of rows of {x_stride} and {y_stride}: not by 4")
        width = span.count * span.size
        last = span.source + (span.count - 1) * span.step + span.size
        if last > x_stride or span.target + width > y_stride or span.step < span.size:
            raise ValueError(f"span_norm: {span} does not fit rows of {x_stride} and {y_stride}")
    return {
        "x_stride": x_stride,
        "y_stride": y_stride,
        "epsilon": epsilon,
        "lanes": row_lanes(recording, max(span.size for span in spans)),
        "spans": [
            {
                "count": span.count,
                "quads": span.size // 4,
                "step": span.step // 4,
                "source": span.source // 4,
                "target": span.target // 4,
                "normed": span.normed,
                "weight": -1 if span.weight is None else span.weight // 4,
            }
            for span in spans
        ],
    }
