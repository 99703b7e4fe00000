"""Rows by index."""

import numpy as np
import pytest

from lora.forward.gather import gather_rows
from lora.forward.model.inputs import NO_ROW
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import MARKER, activation, extent_in_use, marked, run_twice


@pytest.mark.parametrize(
    ("rows", "picked", "width"), [(1, 1, 4), (3, 2, 100), (67, 20, 36), (130, 129, 576)]
)
def test_gather(recording: Recording, rows: int, picked: int, width: int) -> None:
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, width)).astype(np.float32)
    indices = np.sort(rng.choice(rows, picked, replace=False))
    targets = extent_in_use(recording, picked + 3, picked)
    padded = np.concatenate([indices, [0, 0, 0]])
    out = marked(recording, targets, width)
    program = Program(recording)
    row_extent = recording.memory.extent(rows)
    source = activation(recording, x, row_extent)
    gather_rows(program, source, activation(recording, padded, targets), targets, out=out)
    result = run_twice(program, out)
    assert (result[:picked] == x[indices]).all()
    assert (result[picked:] == MARKER).all()


def test_no_row_is_a_row_of_zeros(recording: Recording) -> None:
    x = recording.memory.upload(np.ones((2, 4)))
    extent = recording.memory.extent(4)
    out = marked(recording, extent, 4)
    program = Program(recording)
    indices = activation(recording, np.array([NO_ROW, 1, 1, NO_ROW], np.uint32), extent)
    gather_rows(program, x, indices, extent, out=out)
    assert (run_twice(program, out)[:, 0] == [0, 1, 1, 0]).all()


def test_a_width_of_no_whole_vectors_is_refused(recording: Recording) -> None:
    extent = recording.memory.extent(2)
    x, indices = recording.memory.empty((2, 6)), recording.memory.empty((2,), "u32", extent=extent)
    with pytest.raises(ValueError, match="no multiple of 4"):
        gather_rows(Program(recording), x, indices, extent)
