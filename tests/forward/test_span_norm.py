"""Norms of stretches of rows against float64 numpy; see lora/checks/kernels/spans.py."""

from __future__ import annotations

import pytest

from lora.checks.comparison import NotHereError
from lora.checks.kernels.spans import APART, HEADS, WHOLE, check_scale_rows, check_span_norm
from lora.forward.scale_rows import scale_rows
from lora.forward.span_norm import Span, span_norm
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import with_facts


@pytest.mark.parametrize("spans", [WHOLE, HEADS, APART], ids=["whole", "heads", "apart"])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("is_cpu", [False, True])
def test_span_norm(recording: Recording, spans: tuple[Span, ...], dtype: str, is_cpu: bool) -> None:
    try:
        result = check_span_norm(with_facts(recording, is_cpu=is_cpu), spans, dtype)
    except NotHereError as why:
        pytest.skip(str(why))
    assert result.passed, result


def test_one_row(recording: Recording) -> None:
    assert check_span_norm(recording, WHOLE, "f32", rows=3).passed


def test_wide_spans(recording: Recording) -> None:
    """A lane goes round several times."""
    assert check_span_norm(recording, (Span(1, 96, 4, 0, None),), "f32").passed


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_scale_rows(recording: Recording, placed: bool, dtype: str) -> None:
    try:
        assert check_scale_rows(recording, placed, dtype).passed
    except NotHereError as why:
        pytest.skip(str(why))


def test_spans_that_do_not_fit_are_refused(recording: Recording) -> None:
    extent = recording.memory.extent(2)
    x, out = (recording.memory.empty((2, 24), extent=extent) for _ in range(2))
    weights, program = recording.memory.empty((24,)), Program(recording)
    with pytest.raises(ValueError, match="does not fit rows of 24 and 24"):
        span_norm(program, x, weights, 1e-6, [Span(2, 12, 4, 0, None)], out)
    with pytest.raises(ValueError, match="not by 4"):
        span_norm(program, x, weights, 1e-6, [Span(1, 10, 0, 0, None)], out)
    with pytest.raises(ValueError, match="not by 4, or too many"):
        scale_rows(program, x, weights, n_columns=28)
