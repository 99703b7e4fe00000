"""Checks of kernels on matrix units, in plain WGSL: a GPU that fails one leaves its units alone."""

from __future__ import annotations

import pytest

from lora.checks.comparison import Check, NotHereError
from lora.checks.kernels import adapters, attention
from lora.forward.matmul_matrix import EMULATED
from lora.shaders.recording import Recording
from tests.support.half_tensors import needs_halves
from tests.support.kernels import with_facts

CHECKS = [c for c in (*attention.CHECKS, *adapters.CHECKS) if "_matrix" in c.kernel]


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_kernels_that_are_right_pass_well(
    recording: Recording, monkeypatch: pytest.MonkeyPatch, check: Check
) -> None:
    """With room to spare: other units round otherwise."""
    needs_halves(recording.facts)
    if recording.facts.matrix_shapes:
        pytest.skip("software with units of its own would compile them for minutes")
    for family in (attention, adapters):
        monkeypatch.setattr(family, "shape_on", lambda _: EMULATED)
        monkeypatch.setattr(family, "spare_software", lambda _: None)
    try:
        found = check.run(with_facts(recording, is_cpu=check.as_cpu))
    except NotHereError as reason:
        pytest.skip(str(reason))
    assert found.passed and found.error < 0.7 * found.bound
