"""The gradient of causal convolutions; see lora/checks/kernels/convolutions.py."""

from __future__ import annotations

import numpy as np
import pytest

from lora.checks.comparison import NotHereError
from lora.checks.kernels.convolutions import check_causal_conv
from lora.checks.references.causal_conv import (
    causal_conv_backward_reference,
    causal_conv_reference,
)
from lora.shaders.recording import Recording
from tests.support.kernels import central_difference


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "silu"])
@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_causal_conv_backward(recording: Recording, gated: bool, taps: int, dtype: str) -> None:
    try:
        result = check_causal_conv(recording, gated, taps, dtype, backward=True)
    except NotHereError as why:
        pytest.skip(str(why))
    assert result.passed, result


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "silu"])
def test_the_reference_is_a_gradient(gated: bool) -> None:
    rng = np.random.default_rng(0)
    x, direction = rng.normal(size=(2, 9, 24))
    d_y, weight = rng.normal(size=(9, 8)), rng.normal(size=(3, 8))
    starts = np.array([0, 0, 2, 2, 2, 2, 2, 7, 8])

    def loss(x: np.ndarray) -> float:
        return float((d_y * causal_conv_reference(x, weight, starts, gated)).sum())

    gradient = causal_conv_backward_reference(x, weight, starts, gated, d_y)
    assert (gradient * direction).sum() == pytest.approx(
        central_difference(loss, x, direction), rel=1e-7
    )
