"""Our training of the real SmolLM2 against what PEFT gave, as recorded by peft_reference.py."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.parity.ours import OurRun, run_ours
from tests.parity.peft_reference import RECORD, make_adapter

REFERENCE = json.loads(RECORD.read_text())


@pytest.fixture(scope="module")
def run(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> OurRun:
    adapter = tmp_path_factory.mktemp("adapter")
    make_adapter(adapter)
    return run_ours(smollm2, adapter, recompute="on")


# The tolerances are the issue's; f32 sums in another order give far less (see docs/log.md).
def test_losses(run: OurRun) -> None:
    np.testing.assert_allclose(run.losses, REFERENCE["losses"], rtol=5e-4)


def test_gradient_norms(run: OurRun) -> None:
    np.testing.assert_allclose(run.grad_norms, REFERENCE["grad_norms"], rtol=5e-3)


def test_eval_losses_of_the_final_adapter(run: OurRun) -> None:
    np.testing.assert_allclose(run.eval_losses, REFERENCE["eval_losses_after"], rtol=5e-4)


def test_sampled_values_of_the_final_adapter(run: OurRun) -> None:
    """Within 2% of how far PEFT's moved, over all sampled values together."""
    error, moved = 0.0, 0.0
    for name, sample in REFERENCE["sampled"].items():
        places = np.array(sample["places"])
        theirs = np.array(sample["values"])
        start = run.initial[name].reshape(-1)[places]
        error += float(((run.final[name].reshape(-1)[places] - theirs) ** 2).sum())
        moved += float(((theirs - start) ** 2).sum())
    assert error**0.5 < 0.02 * moved**0.5
    assert moved > 0


def test_movement_of_every_sampled_tensor(run: OurRun) -> None:
    for name, sample in REFERENCE["sampled"].items():
        movement = float(np.linalg.norm(run.final[name] - run.initial[name]))
        assert movement == pytest.approx(sample["movement"], rel=0.02), name
