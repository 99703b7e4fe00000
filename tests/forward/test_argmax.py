"""The most likely token of a row."""

from __future__ import annotations

import numpy as np
import pytest

from lora.forward.argmax import argmax
from lora.shaders.device import Device
from lora.shaders.program import Program
from tests.support.kernels import activation, extent_in_use


@pytest.mark.parametrize(("length", "width"), [(1, 4), (255, 256), (257, 260), (3000, 3004)])
def test_argmax(device: Device, length: int, width: int) -> None:
    """As numpy: of equal ones the lowest; not past the length, not in rows that are not in use."""
    rng = np.random.default_rng(length)
    x = rng.integers(-3, 3, (7, width)).astype(np.float32)  # many equal ones
    x[1] = rng.normal(size=width)
    x[2] = -1e30
    x[3] = -1.0
    x[3, length - 1] = 1e30
    x[:, length:] = 2e30
    extent = extent_in_use(device, 7, 6)
    out = device.empty((7,), "u32", extent=extent)
    device.write(out, np.full(7, 99, np.uint32))
    program = Program(device)
    argmax(program, activation(device, x, extent), out, length=length)
    program.run()
    assert device.read(out).tolist() == [*x[:6, :length].argmax(axis=1).tolist(), 99]


def test_wrong_lengths_are_refused(device: Device) -> None:
    extent = extent_in_use(device, 1, 1)
    x = activation(device, np.zeros((1, 8), np.float32), extent)
    with pytest.raises(ValueError, match="9 columns"):
        argmax(Program(device), x, device.empty((1,), "u32"), length=9)
