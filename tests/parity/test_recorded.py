"""Our training of the real models against what PEFT gave, as recorded by peft_reference.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.peak_memory import Peak, peak_memory
from tests.support.peft_ours import OurRun, run_ours
from tests.support.peft_reference import REAL_MODELS, RealModel, make_adapter

# `make test` has SmolLM2 alone: Gemma's eight steps take three minutes of a processor, and what it
# has that SmolLM2 hasn't, tiny models have.
PARITY = {"gemma3": [pytest.mark.parity, pytest.mark.long]}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=PARITY.get(name, ())) for name in REAL_MODELS]
)
def model(request: pytest.FixtureRequest) -> RealModel:
    request.getfixturevalue(request.param)  # skips where the file is absent
    return REAL_MODELS[request.param]


@pytest.fixture(scope="module")
def reference(model: RealModel) -> dict[str, Any]:
    return dict(json.loads(model.record.read_text()))


@pytest.fixture(scope="module")
def measured(model: RealModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[OurRun, Peak]:
    adapter: Path = tmp_path_factory.mktemp("adapter")
    make_adapter(model, adapter)
    with peak_memory() as peak:
        run = run_ours(model.path, adapter, recompute="on")
    return run, peak


@pytest.fixture
def run(measured: tuple[OurRun, Peak]) -> OurRun:
    return measured[0]


# The tolerances are the issue's; f32 sums in another order give far less (see docs/log.md).
def test_losses(run: OurRun, reference: dict[str, Any]) -> None:
    np.testing.assert_allclose(run.losses, reference["losses"], rtol=5e-4)


def test_gradient_norms(run: OurRun, reference: dict[str, Any]) -> None:
    np.testing.assert_allclose(run.grad_norms, reference["grad_norms"], rtol=5e-3)


def test_eval_losses_of_the_final_adapter(run: OurRun, reference: dict[str, Any]) -> None:
    np.testing.assert_allclose(run.eval_losses, reference["eval_losses_after"], rtol=5e-4)


def test_sampled_values_of_the_final_adapter(run: OurRun, reference: dict[str, Any]) -> None:
    """Within 2% of how far PEFT's moved, over all sampled values together."""
    error, moved = 0.0, 0.0
    for name, sample in reference["sampled"].items():
        places = np.array(sample["places"])
        theirs = np.array(sample["values"])
        start = run.initial[name].reshape(-1)[places]
        error += float(((run.final[name].reshape(-1)[places] - theirs) ** 2).sum())
        moved += float(((theirs - start) ** 2).sum())
    assert error**0.5 < 0.02 * moved**0.5
    assert moved > 0


def test_movement_of_every_sampled_tensor(run: OurRun, reference: dict[str, Any]) -> None:
    for name, sample in reference["sampled"].items():
        movement = float(np.linalg.norm(run.final[name] - run.initial[name]))
        assert movement == pytest.approx(sample["movement"], rel=0.02), name


def test_training_takes_at_most_600_megabytes(
    measured: tuple[OurRun, Peak], model: RealModel
) -> None:
    """Of the host's memory, which a software driver's is; `make parity-long` has quickstart's."""
    if model.name != "smollm2":
        pytest.skip("the limit is SmolLM2's")
    growth = measured[1].growth
    if growth is None:
        pytest.skip("the system does not tell a process's peak")
    print(f"{growth / 1e6:.0f} MB more at the peak")
    assert growth <= 600e6


def test_the_large_embedding_is_split(run: OurRun, model: RealModel) -> None:
    """Gemma's is larger than the software driver's largest binding."""
    embedding = run.session.model.embedding
    if model.name == "gemma3":
        assert embedding.n_bytes > 128 << 20
    limit = run.session.device.facts.max_binding
    assert max(part.words.n_bytes for part in embedding.parts) <= limit
    rows = [(part.first_feature, part.out_features) for part in embedding.parts]
    assert sum(n for _, n in rows) == embedding.out_features
    assert all(a + n == b for (a, n), (b, _) in zip(rows, rows[1:], strict=False))
