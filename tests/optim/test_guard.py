"""Which steps count and what the loss is scaled by, against the reference in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from lora.checks.comparison import Comparison
from lora.checks.kernels.adapters import check_scaled_weight, check_step_guard
from lora.checks.references.optim import GuardReference
from lora.optim.guard import METRICS, STATE_AT, GuardState, Scaling, step_guard
from lora.shaders.program import Program
from lora.shaders.recording import Recording


def passed(comparison: Comparison) -> bool:
    return comparison.passed


@pytest.mark.parametrize("scaled", [False, True])
def test_as_the_reference(recording: Recording, scaled: bool) -> None:
    assert passed(check_step_guard(recording, scaled))


def test_the_weight_of_a_token_follows_the_scale(recording: Recording) -> None:
    assert passed(check_scaled_weight(recording))


def test_the_reference_by_hand() -> None:
    reference = GuardReference((8.0, 2, 1.0, 64.0), 3)
    assert reference.step(1.0, 16.0, None) == [2.0, 1 / 8, 1.0, 0.0, 8.0, 1, 0, 0, 0]
    assert reference.step(1.0, 16.0, 1.0)[4:] == [16.0, 0, 0, 0, 0]  # doubled after two good ones
    assert reference.step(math.nan, 16.0, 1.0)[2:] == [0.0, 0.0, 8.0, 0, 1, 1, 0]
    assert reference.step(1.0, math.inf, 1.0)[2:] == [0.0, 0.0, 4.0, 0, 0, 2, 1]
    assert reference.step(1.0, math.inf, 1.0)[2:] == [0.0, 0.0, 1.0, 0, 0, 3, 2]
    # The scale is at its least: now steps count towards the end.
    assert reference.step(1.0, math.inf, 1.0)[2:] == [0.0, 0.0, 1.0, 0, 1, 4, 0]
    assert reference.step(math.nan, 1.0, 1.0)[2:] == [0.0, 0.0, 1.0, 0, 2, 5, 0]
    assert reference.step(1.0, math.inf, 1.0)[2:] == [0.0, 0.0, 1.0, 0, 3, 6, 0]
    # The third in a row: nothing counts or changes any more.
    assert reference.step(1.0, 1.0, 1.0)[2:] == [0.0, 0.0, 1.0, 0, 3, 6, 0]


def test_a_scale_far_too_large_is_found_in_a_few_steps() -> None:
    """Gradients that overflow at 2^-9 and above: half a dozen steps, and the run goes on."""
    scaling = Scaling()
    reference = GuardReference((scaling.begin, 2000, scaling.least, scaling.most), 3)
    steps = 0
    while reference.scale > 2.0**-10:
        reference.step(1.0, math.inf, 1.0)
        steps += 1
    assert steps <= 5 and reference.in_a_row == 0
    assert reference.step(1.0, 1.0, 1.0)[2] == 1.0


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_random_steps(recording: Recording, max_norm: float | None) -> None:
    """Two hundred, a third of them bad; after three in a row the host starts it again."""
    rng = np.random.default_rng(3)
    scaling = Scaling(begin=1024.0, growth_interval=3)
    metrics, program = recording.memory.empty((METRICS,)), Program(recording)
    step_guard(program, metrics, scaling=scaling, max_norm=max_norm)
    reference = GuardReference((1024.0, 3, scaling.least, scaling.most), 3)
    values = np.zeros(METRICS, np.float32)
    GuardState(scale=1024.0).put_into(values)
    for _ in range(200):
        loss, norm = (float(x) for x in rng.choice([math.nan, math.inf, 1.0, 2.0, 3.5], 2))
        values[0], values[STATE_AT] = loss, norm
        values[STATE_AT + 2] = float(math.isfinite(norm))
        recording.memory.write(metrics, values)
        program.run()
        values = recording.memory.read(metrics)
        expected = reference.step(loss, norm, max_norm)
        assert values[STATE_AT + 2 : STATE_AT + 9].tolist() == expected[2:]
        if math.isfinite(norm):
            np.testing.assert_allclose(values[STATE_AT : STATE_AT + 2], expected[:2], rtol=1e-6)
        if reference.in_a_row == 3:
            reference.in_a_row = 0
            guard = GuardState.of_metrics(values)
            replace(guard, in_a_row=0).put_into(values)
    assert reference.skipped > 60


def test_what_a_checkpoint_keeps() -> None:
    """All but the steps in a row: a resumed run tries again."""
    guard = GuardState(2.0**-3, 17, 2, 5, 1)
    assert GuardState.of_dict(guard.as_dict()) == GuardState(2.0**-3, 17, 0, 5, 1)
    # As checkpoints had it that know of no overflows.
    kept = {"scale": 8.0, "good_steps": 3, "skipped": 1}
    assert GuardState.of_dict(kept).as_dict() == kept
    values = np.zeros(METRICS, np.float32)
    guard.put_into(values)
    assert GuardState.of_metrics(values) == guard
