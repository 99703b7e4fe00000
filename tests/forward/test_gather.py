"""Rows by index, and the inverse index as the gradient."""

import numpy as np
import pytest

from forward.gather import NO_ROW, gather_rows
from shaders.device import Device
from shaders.program import Program
from tests.kernels import MARKER, activation, extent_in_use, marked, run_twice


@pytest.mark.parametrize(("rows", "picked", "width"), [(1, 1, 4), (67, 20, 36), (130, 129, 576)])
def test_gather_and_its_gradient(device: Device, rows: int, picked: int, width: int) -> None:
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

    # The gradient of y = P x is Pᵀ d_y: each row gets its slot's gradient, or zeros.
    d_y = rng.normal(size=(picked + 3, width)).astype(np.float32)
    slots = np.full(rows, NO_ROW, np.uint32)
    slots[indices] = np.arange(picked)
    d_x = marked(device, row_extent, width)
    program = Program(device)
    gather_rows(
        program, activation(device, d_y, targets), activation(device, slots, row_extent),
        row_extent, out=d_x,
    )  # fmt: skip
    expected = np.zeros_like(x)
    expected[indices] = d_y[:picked]
    assert (run_twice(program, d_x) == expected).all()
