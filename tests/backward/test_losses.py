"""Weights of losses, the supervised one's and a script's own, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from lora.backward.losses import LANES, loss_weights
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import MARKER, extent_in_use, marked, run_twice


@pytest.mark.parametrize(
    ("rows", "in_use"),
    [(1, 1), (64, 63), (65, 65), (130, 0), (LANES * 65_535 + 70, LANES * 65_535 + 65)],
)
def test_equal_weights(recording: Recording, rows: int, in_use: int) -> None:
    extent = extent_in_use(recording, rows, in_use)
    weights, scale = marked(recording, extent), recording.memory.uniform()
    recording.memory.write(scale, np.array([1024 / 7, 0, 0, 0], np.float32).view(np.uint32))
    program = Program(recording)
    loss_weights(program, scale, weights)
    found = run_twice(program, weights)
    assert (found[:in_use] == np.float32(1024 / 7)).all() and (found[in_use:] == MARKER).all()


def test_weights_without_an_extent_are_refused(recording: Recording) -> None:
    memory = recording.memory
    with pytest.raises(ValueError, match="need an extent"):
        loss_weights(Program(recording), memory.uniform(), memory.empty((4,)))
