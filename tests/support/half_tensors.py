"""What the tests of kernels over f16 tensors share."""

from __future__ import annotations

import numpy as np
import pytest

from lora.shaders.device import Device
from lora.shaders.tensor import Extent, Tensor
from tests.support.kernels import MARKER


def needs_halves(device: Device) -> None:
    """Skips the test where the device has no f16."""
    if "shader-f16" not in device.features:
        pytest.skip(f"{device.name} has no shader-f16")


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """f32 values as a tensor of that type holds them."""
    return values.astype(np.float16 if dtype == "f16" else np.float32).astype(np.float32)


def typed(device: Device, values: np.ndarray, dtype: str, extent: Extent) -> Tensor:
    """An activation of that type holding `values` [rows, …]."""
    tensor = device.empty(values.shape, dtype, extent=extent)
    device.write(tensor, values)
    return tensor


def typed_marked(device: Device, dtype: str, extent: Extent, *shape: int) -> Tensor:
    """An output [extent.maximum, *shape] of that type filled with MARKER."""
    return typed(device, np.full((extent.maximum, *shape), MARKER), dtype, extent)


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
