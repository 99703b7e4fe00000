"""Causal convolutions against float64 numpy; see lora/checks/kernels/convolutions.py."""

from __future__ import annotations

import numpy as np
import pytest

from lora.checks.comparison import NotHereError
from lora.checks.kernels.convolutions import check_causal_conv, check_causal_conv_text
from lora.forward.causal_conv import Convolution, causal_conv
from lora.shaders.program import Program
from lora.shaders.recording import Recording


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "silu"])
@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_causal_conv(recording: Recording, gated: bool, taps: int, dtype: str) -> None:
    try:
        result = check_causal_conv(recording, gated, taps, dtype)
    except NotHereError as why:
        pytest.skip(str(why))
    assert result.passed, result


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "silu"])
@pytest.mark.parametrize("position", [0, 7])
@pytest.mark.parametrize("rows", [1, 2, 3, 9])
def test_new_rows_of_a_text(recording: Recording, gated: bool, rows: int, position: int) -> None:
    """Fewer than the taps, as many, and more, at a text's beginning and after it."""
    result = check_causal_conv_text(recording, gated, rows, position)
    assert result.passed, result


def test_what_does_not_fit_is_refused(recording: Recording) -> None:
    extent, program = recording.memory.extent(2), Program(recording)
    x, out = (recording.memory.empty((2, n), extent=extent) for n in (16, 8))
    segments = recording.memory.empty((2, 2), "u32", extent=extent)
    weight = recording.memory.upload(np.ones((3, 8), np.float32))
    with pytest.raises(ValueError, match="8 of 16 columns: not by 4, or too many"):
        causal_conv(program, x, Convolution(weight, gated=True), segments, out)
    with pytest.raises(ValueError, match="causal_conv output has shape"):
        causal_conv(program, x, Convolution(weight, gated=False), segments, x)
