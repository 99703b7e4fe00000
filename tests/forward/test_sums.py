"""Sums of one value a row against float64 numpy."""

import numpy as np
import pytest

from lora.forward.sums import sum_into
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import activation, extent_in_use, run_twice


@pytest.mark.parametrize(
    ("rows", "in_use"), [(1, 1), (3, 0), (3, 2), (67, 64), (130, 129), (10_001, 9_999)]
)
def test_sum_into(recording: Recording, rows: int, in_use: int) -> None:
    rng = np.random.default_rng(rows)
    values = rng.uniform(0, 12, rows).astype(np.float32)
    values[in_use:] = np.nan  # rows that are not in use are not read
    extent = extent_in_use(recording, rows, in_use)
    totals = activation(recording, np.arange(64, dtype=np.float32), extent)
    program = Program(recording)
    sum_into(program, activation(recording, values, extent), extent, totals, 5)
    result = run_twice(program, totals)
    # Positive terms: 157 additions a lane at most, then a tree, each within 2^-24 relative.
    expected = 5 + float(values[:in_use].astype(np.float64).sum())
    assert result[5] == pytest.approx(expected, rel=1e-5)
    assert (np.delete(result, 5) == np.delete(np.arange(64), 5)).all()


def test_replays_accumulate(recording: Recording) -> None:
    extent = recording.memory.extent(67)
    values = activation(recording, np.ones(67, np.float32), extent)
    totals = recording.memory.empty((3,))
    program = Program(recording)
    sum_into(program, values, extent, totals, 0)
    sum_into(program, values, extent, totals, 2)
    for _ in range(3):
        program.run()
    assert recording.memory.read(totals).tolist() == [201, 0, 201]  # small whole numbers: exact


@pytest.mark.parametrize("slot", [-1, 3])
def test_a_slot_past_the_end_is_refused(recording: Recording, slot: int) -> None:
    """WGSL would clamp the index: the sum would land in another's slot."""
    extent = recording.memory.extent(4)
    values, totals = recording.memory.empty((4,), extent=extent), recording.memory.empty((3,))
    with pytest.raises(ValueError, match="slot"):
        sum_into(Program(recording), values, extent, totals, slot)
