"""Which steps count and what the loss is scaled by, against the reference in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from lora.checks.comparison import Comparison
from lora.checks.kernels.adapters import check_scaled_weight, check_step_guard
from lora.checks.references.optim import GuardReference
from lora.optim.guard import METRICS, STATE_AT, GuardState, Scaling, scaled_weight, step_guard
from lora.shaders.program import Program
from lora.shaders.recording import Recording


def passed(comparison: Comparison) -> bool:
    return comparison.passed


@pytest.mark.parametrize("scaled", [False, True])
def test_as_the_reference(recording: Recording, scaled: bool) -> None:
    assert passed(check_step_guard(recording, scaled))


def test_the_weight_of_a_token_follows_the_scale(recording: Recording) -> None:
    assert passed(check_scaled_weight(recording))


def stepped(
    reference: GuardReference, loss: float, norm: float, again: bool = False
) -> list[float]:
    """The state from "counts" on, but for the 0, after a step clipped to 1."""
    reference.begin(again)
    _, _, counts, _, *rest = reference.step(loss, norm, 1.0)
    return [counts, *rest]


def test_the_reference_by_hand() -> None:
    """Whether it counts; scale, good steps, in a row, skipped, tries, held, scale of the first."""
    reference = GuardReference((8.0, 2, 1.0, 64.0), 3)
    assert reference.step(1.0, 16.0, None)[:6] == [2.0, 1 / 8, 1.0, 0.0, 8.0, 1]
    assert stepped(reference, 1.0, 16.0) == [1, 16.0, 0, 0, 0, 0, 0, 8.0]  # doubled after two
    assert stepped(reference, math.nan, 16.0) == [0, 8.0, 0, 1, 1, 0, 0, 16.0]
    assert stepped(reference, 1.0, math.inf) == [0, 4.0, 0, 1, 1, 1, 1, 8.0]
    # What comes behind it changes nothing, whatever it is, until it is run again.
    for loss, norm in ((1.0, 1.0), (math.nan, 1.0), (1.0, math.inf)):
        assert stepped(reference, loss, norm) == [0, 4.0, 0, 1, 1, 1, 1, 8.0]
    assert stepped(reference, 1.0, math.inf, True) == [0, 1.0, 0, 1, 1, 2, 1, 8.0]
    assert stepped(reference, 1.0, 2.0, True) == [1, 1.0, 1, 0, 1, 0, 0, 8.0]
    # The scale is at its least: now one is skipped.
    assert stepped(reference, 1.0, math.inf) == [0, 1.0, 0, 1, 2, 0, 0, 1.0]


def test_a_step_that_no_scale_helps_costs_none_of_it() -> None:
    """Three of them in a row end a run, tried at every scale; a good one sets them back."""
    reference = GuardReference((8.0, 2, 1.0, 64.0), 3)
    for n in (1, 2):
        assert stepped(reference, 1.0, math.inf)[1] == 4.0
        assert stepped(reference, 1.0, math.nan, True)[1] == 1.0
        assert stepped(reference, 1.0, math.inf, True) == [0, 8.0, 0, n, n, 0, 0, 8.0]
    assert stepped(reference, 1.0, 8.0) == [1, 8.0, 1, 0, 2, 0, 0, 8.0]
    for _ in range(3):
        assert stepped(reference, math.nan, 1.0)[0] == 0
    halted = [0, 1.0, 0, 3, 5, 0, 0, 2.0]
    assert stepped(reference, math.nan, 1.0)[:6] == halted[:6]
    assert stepped(reference, 1.0, math.inf)[:6] == halted[:6]


def test_a_scale_far_too_large_is_found_in_a_few_tries() -> None:
    """Gradients that overflow at 2^-9 and above: half a dozen tries of the first step."""
    scaling = Scaling()
    reference = GuardReference((scaling.begin, 2000, scaling.least, scaling.most), 3)
    tries = 0
    while reference.scale > 2.0**-10:
        stepped(reference, 1.0, math.inf, tries > 0)
        tries += 1
    assert tries <= 5 and reference.in_a_row == reference.skipped == 0
    assert stepped(reference, 1.0, 1.0, True)[0] == 1.0


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_random_steps(recording: Recording, max_norm: float | None) -> None:
    """Two hundred, half of them bad; what is held is run again some steps later.

    After three that are skipped in a row the host starts it again.
    """
    rng = np.random.default_rng(3)
    scaling = Scaling(begin=1024.0, growth_interval=3)
    metrics, program = recording.memory.empty((METRICS,)), Program(recording)
    weight, scaled = recording.memory.uniform(), recording.memory.empty((4,))
    scaled_weight(program, metrics, weight, scaled, scaling)
    step_guard(program, metrics, scaling=scaling, max_norm=max_norm)
    reference = GuardReference((1024.0, 3, scaling.least, scaling.most), 3)
    values = np.zeros(METRICS, np.float32)
    GuardState(scale=1024.0, first_scale=1024.0).put_into(values)
    n_held = 0
    for _ in range(200):
        again = reference.held and bool(rng.integers(2))
        n_held += reference.held
        reference.begin(again)
        words = np.array([1.0, float(again), 0.0, 0.0], np.float32)
        recording.memory.write(weight, words.view(np.uint32))
        loss, norm = (float(x) for x in rng.choice([math.nan, math.inf, 1.0, 2.0, 3.5], 2))
        values[0], values[STATE_AT] = loss, norm
        values[STATE_AT + 2] = float(math.isfinite(norm))
        recording.memory.write(metrics, values)
        program.run()
        values = recording.memory.read(metrics)
        expected = reference.step(loss, norm, max_norm)
        assert values[STATE_AT + 2 : STATE_AT + 11].tolist() == expected[2:]
        if math.isfinite(norm):
            np.testing.assert_allclose(values[STATE_AT : STATE_AT + 2], expected[:2], rtol=1e-6)
        if reference.in_a_row == 3:
            reference.in_a_row = 0
            guard = GuardState.of_metrics(values)
            replace(guard, in_a_row=0).put_into(values)
    assert reference.skipped > 30 and n_held > 30


def test_what_a_checkpoint_keeps() -> None:
    """All but the steps in a row, and a step's tries: a resumed run tries again."""
    guard = GuardState(2.0**-3, 17, 2, 5, 1, True, 16.0)
    kept = {"scale": 2.0**-3, "good_steps": 17, "skipped": 5}
    assert guard.as_dict() == kept
    assert GuardState.of_dict(kept) == GuardState(2.0**-3, 17, 0, 5)
    # As checkpoints had it whose steps were skipped in place of run again.
    assert GuardState.of_dict(kept | {"overflows": 2}) == GuardState(2.0**-3, 17, 0, 5)
    values = np.zeros(METRICS, np.float32)
    guard.put_into(values)
    assert GuardState.of_metrics(values) == guard
