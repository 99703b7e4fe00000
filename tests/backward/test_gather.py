"""The gradient of a gather: the same kernel with the inverse index."""

import numpy as np
import pytest

from lora.checks.references.gather import gather_backward_reference
from lora.forward.gather import gather_rows
from lora.forward.model.inputs import NO_ROW
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import (
    MARKER,
    activation,
    central_difference,
    extent_in_use,
    marked,
    run_twice,
)


def test_reference_is_the_derivative() -> None:
    rng = np.random.default_rng(0)
    x, direction, d_y = rng.normal(size=(9, 4)), rng.normal(size=(9, 4)), rng.normal(size=(5, 4))
    indices = np.array([0, 2, 3, 7, 8])
    slope = central_difference(lambda v: float((v[indices] * d_y).sum()), x, direction)
    expected = (gather_backward_reference(d_y, indices, 9) * direction).sum()
    assert slope == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    ("rows", "in_use", "picked", "width"),
    [(1, 1, 1, 4), (3, 2, 0, 36), (67, 66, 20, 100), (130, 130, 129, 576)],
)
def test_gather_backward(
    recording: Recording, rows: int, in_use: int, picked: int, width: int
) -> None:
    rng = np.random.default_rng(rows)
    indices = np.sort(rng.choice(in_use, picked, replace=False))
    d_y = rng.normal(size=(picked + 3, width)).astype(np.float32)
    slots = np.full(rows, NO_ROW, np.uint32)
    slots[indices] = np.arange(picked)
    targets = extent_in_use(recording, picked + 3, picked)
    extent = extent_in_use(recording, rows, in_use)
    d_x = marked(recording, extent, width)
    program = Program(recording)
    gather_rows(
        program,
        activation(recording, d_y, targets),
        activation(recording, slots, extent),
        extent,
        out=d_x,
    )
    result = run_twice(program, d_x)
    expected = gather_backward_reference(d_y[:picked], indices, rows)
    assert (result[:in_use] == expected[:in_use]).all()  # copies: exact
    assert (result[in_use:] == MARKER).all()
