"""Rows by index."""

import numpy as np
import pytest

from lora.forward.gather import gather_rows
from lora.forward.model.inputs import NO_ROW
from lora.shaders.device import Device
from lora.shaders.program import Program
from tests.support.kernels import MARKER, activation, extent_in_use, marked, run_twice


@pytest.mark.parametrize(
    ("rows", "picked", "width"), [(1, 1, 4), (3, 2, 100), (67, 20, 36), (130, 129, 576)]
)
def test_gather(device: Device, rows: int, picked: int, width: int) -> None:
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, width)).astype(np.float32)
    indices = np.sort(rng.choice(rows, picked, replace=False))
    targets = extent_in_use(device, picked + 3, picked)
    padded = np.concatenate([indices, [0, 0, 0]])
    out = marked(device, targets, width)
    program = Program(device)
    row_extent = device.extent(rows)
    source = activation(device, x, row_extent)
    gather_rows(program, source, activation(device, padded, targets), targets, out=out)
    result = run_twice(program, out)
    assert (result[:picked] == x[indices]).all()
    assert (result[picked:] == MARKER).all()


def test_no_row_is_a_row_of_zeros(device: Device) -> None:
    x = device.upload(np.ones((2, 4)))
    extent = device.extent(4)
    out = marked(device, extent, 4)
    program = Program(device)
    indices = activation(device, np.array([NO_ROW, 1, 1, NO_ROW], np.uint32), extent)
    gather_rows(program, x, indices, extent, out=out)
    assert (run_twice(program, out)[:, 0] == [0, 1, 1, 0]).all()


def test_a_width_of_no_whole_vectors_is_refused(device: Device) -> None:
    extent = device.extent(2)
    x, indices = device.empty((2, 6)), device.empty((2,), "u32", extent=extent)
    with pytest.raises(ValueError, match="no multiple of 4"):
        gather_rows(Program(device), x, indices, extent)
