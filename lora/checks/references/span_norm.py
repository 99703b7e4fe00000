"""RMSNorm of groups of columns and its gradient, group by group."""

from collections.abc import Sequence

import numpy as np

from lora.checks.references.rmsnorm import rmsnorm_backward_reference, rmsnorm_reference
from lora.forward.span_norm import Span


def _weight(span: Span, weights: np.ndarray) -> np.ndarray:
    if span.weight is None:
        return np.ones(span.size)
    return weights[span.weight : span.weight + span.size]


def span_norm_reference(
    x: np.ndarray, weights: np.ndarray, epsilon: float, spans: Sequence[Span], out: np.ndarray
) -> np.ndarray:
    """`out` [rows, any width] with the spans' columns written, of x [rows, any width]."""
    y = out.astype(np.float64)
    for span in spans:
        for group in range(span.count):
            source, target = span.source + group * span.step, span.target + group * span.size
            part = x[:, source : source + span.size]
            if span.normed:
                part = rmsnorm_reference(part, _weight(span, weights), epsilon)
            y[:, target : target + span.size] = part
    return y


def span_norm_backward_reference(
    x: np.ndarray, weights: np.ndarray, epsilon: float, spans: Sequence[Span], d_y: np.ndarray
) -> np.ndarray:
    """d_x shaped as x for the loss Σ d_y · y; zero outside the spans."""
    d_x = np.zeros(x.shape)
    for span in spans:
        for group in range(span.count):
            source, target = span.source + group * span.step, span.target + group * span.size
            part, d = x[:, source : source + span.size], d_y[:, target : target + span.size]
            if span.normed:
                d = rmsnorm_backward_reference(part, _weight(span, weights), d, epsilon)
            d_x[:, source : source + span.size] += d
    return d_x
