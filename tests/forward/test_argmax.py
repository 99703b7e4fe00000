"""The most likely token of a row."""

from __future__ import annotations

import numpy as np
import pytest

from lora.forward.argmax import argmax
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import activation, extent_in_use


@pytest.mark.parametrize(("length", "width"), [(1, 4), (255, 256), (257, 260), (3000, 3004)])
def test_argmax(recording: Recording, length: int, width: int) -> None:
    """As numpy: of equal ones the lowest; not past the length, not in rows that are not in use."""
    rng = np.random.default_rng(length)
    x = rng.integers(-3, 3, (7, width)).astype(np.float32)  # many equal ones
    x[1] = rng.normal(size=width)
    x[2] = -1e30
    x[3] = -1.0
    x[3, length - 1] = 1e30
    x[:, length:] = 2e30
    extent = extent_in_use(recording, 7, 6)
    out = recording.memory.empty((7,), "u32", extent=extent)
    recording.memory.write(out, np.full(7, 99, np.uint32))
    program = Program(recording)
    argmax(program, activation(recording, x, extent), out, length=length)
    program.run()
    assert recording.memory.read(out).tolist() == [*x[:6, :length].argmax(axis=1).tolist(), 99]


def test_wrong_lengths_are_refused(recording: Recording) -> None:
    extent = extent_in_use(recording, 1, 1)
    x = activation(recording, np.zeros((1, 8), np.float32), extent)
    with pytest.raises(ValueError, match="9 columns"):
        argmax(Program(recording), x, recording.memory.empty((1,), "u32"), length=9)
