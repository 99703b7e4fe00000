"""The gradient of norms of stretches of rows; see lora/checks/kernels/spans.py."""

from __future__ import annotations

import numpy as np
import pytest

from lora.backward.span_norm import span_norm_backward
from lora.checks.comparison import NotHereError
from lora.checks.kernels.spans import APART, HEADS, WHOLE, check_span_norm_backward
from lora.checks.references.span_norm import span_norm_backward_reference, span_norm_reference
from lora.forward.span_norm import Span
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import central_difference, with_facts


@pytest.mark.parametrize(
    ("spans", "in_place"), [(WHOLE, True), (WHOLE, False), (HEADS, False), (APART, False)],
    ids=["whole in place", "whole", "heads", "apart"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("is_cpu", [False, True])
def test_span_norm_backward(
    recording: Recording, spans: tuple[Span, ...], in_place: bool, dtype: str, is_cpu: bool
) -> None:
    try:
        where = with_facts(recording, is_cpu=is_cpu)
        result = check_span_norm_backward(where, spans, dtype, in_place)
    except NotHereError as why:
        pytest.skip(str(why))
    assert result.passed, result


@pytest.mark.parametrize("spans", [WHOLE, HEADS, APART], ids=["whole", "heads", "apart"])
def test_the_reference_is_a_gradient(spans: tuple[Span, ...]) -> None:
    rng = np.random.default_rng(0)
    x, d_y, direction = rng.normal(size=(3, 2, 100))
    weights = rng.normal(1, 0.3, 80)

    def loss(x: np.ndarray) -> float:
        return float((d_y * span_norm_reference(x, weights, 1e-5, spans, 0 * x)).sum())

    gradient = span_norm_backward_reference(x, weights, 1e-5, spans, d_y)
    assert (gradient * direction).sum() == pytest.approx(
        central_difference(loss, x, direction), rel=1e-7
    )


def test_spans_that_move_are_not_done_in_place(recording: Recording) -> None:
    extent = recording.memory.extent(2)
    x, d = (recording.memory.empty((2, 100), extent=extent) for _ in range(2))
    with pytest.raises(ValueError, match="no span moves"):
        span_norm_backward(Program(recording), x, recording.memory.empty((80,)), 1e-5, HEADS, d, d)
