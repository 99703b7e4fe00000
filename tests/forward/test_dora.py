"""DoRA's kernels against float64 numpy, by the checks that devices get, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from lora.backward.dora import dora_gradient
from lora.checks.kernels.dora import CHECKS
from lora.checks.suite import Check
from lora.forward.dora import scale_columns
from lora.forward.model.factors import LoraFactors
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import central_difference, with_facts


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_kernels(recording: Recording, check: Check) -> None:
    comparison = check.run(with_facts(recording, is_cpu=check.as_cpu))
    assert comparison.passed, comparison


def test_the_gradient_is_the_derivative_with_lengths_held() -> None:
    """Of y = m · p / n by m and by p, in numpy: what the kernels are checked against."""
    rng = np.random.default_rng(0)
    p, d_y, n, m = (
        rng.normal(size=(5, 4)),
        rng.normal(size=(5, 4)),
        rng.uniform(1, 2, 4),
        np.ones(4),
    )
    by_m, by_p = (d_y * p).sum(0) / n, d_y * m / n
    for formula, at, found in (
        (lambda v: float((d_y * v * p / n).sum()), m, by_m),
        (lambda v: float((d_y * m * v / n).sum()), p, by_p),
    ):
        direction = rng.normal(size=at.shape)
        slope = central_difference(formula, at, direction)
        assert slope == pytest.approx(float((found * direction).sum()), rel=1e-7)


def test_shapes_that_do_not_fit(recording: Recording) -> None:
    memory = recording.memory
    extent = memory.extent(4)
    x = memory.empty((4, 8), extent=extent)
    with pytest.raises(ValueError, match="scale_columns scales"):
        scale_columns(Program(recording), x, memory.empty((4,)), x)
    lora = LoraFactors(memory.empty((4, 8)), memory.empty((8, 4)), 4, 1.0, ((0, 8),))
    with pytest.raises(ValueError, match="no magnitudes"):
        dora_gradient(Program(recording), x, x, lora, memory.empty((8,)), x)
