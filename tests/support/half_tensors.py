"""What the tests of kernels over f16 tensors share."""

from __future__ import annotations

import numpy as np
import pytest

from lora.checks.tensors import rounded, typed, typed_marked
from lora.shaders.facts import DeviceFacts

__all__ = ["assert_rounded_once", "needs_halves", "rounded", "typed", "typed_marked"]


def needs_halves(facts: DeviceFacts) -> None:
    """Skips the test where the device has no f16."""
    if "shader-f16" not in facts.features:
        pytest.skip(f"{facts.name} has no shader-f16")


def assert_rounded_once(
    result: np.ndarray, expected: np.ndarray, *, rtol: float, atol: float
) -> None:
    """Within what the sums in f32 may miss (rtol, atol), and the rounding of the result.

    f16 has 11 bits: half a unit of the last is 2^-11 relative, 2^-25 among subnormal numbers.
    """
    half = result.dtype == np.float16
    np.testing.assert_allclose(
        result.astype(np.float64), expected,
        rtol=rtol + half * 2**-11, atol=atol + half * 2**-25,
    )  # fmt: skip
