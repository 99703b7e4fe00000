"""Our training of the real models against PEFT's, both run now; and PEFT loads what we export."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.peft_ours import OurRun, run_ours
from tests.support.peft_reference import (
    REAL_MODELS,
    RealModel,
    ReferenceRun,
    eval_losses,
    make_adapter,
    run_reference,
    token_ids,
)

pytestmark = pytest.mark.parity


# PEFT's eight steps of Gemma take minutes; test_recorded.py holds ours against those recorded.
LONG = {"gemma3": [pytest.mark.long]}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=LONG.get(name, ())) for name in REAL_MODELS]
)
def model(request: pytest.FixtureRequest) -> RealModel:
    request.getfixturevalue(request.param)  # skips where the file is absent
    return REAL_MODELS[request.param]


@pytest.fixture(scope="module")
def adapter(model: RealModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    make_adapter(model, directory)
    return directory


@pytest.fixture(scope="module")
def ours(model: RealModel, adapter: Path) -> OurRun:
    return run_ours(model.path, adapter)


@pytest.fixture(scope="module")
def theirs(model: RealModel, adapter: Path) -> ReferenceRun:
    return run_reference(model.path, adapter)


def test_losses(ours: OurRun, theirs: ReferenceRun) -> None:
    print("losses:", ours.losses, theirs.losses)
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=5e-4)


def test_gradient_norms(ours: OurRun, theirs: ReferenceRun) -> None:
    print("gradient norms:", ours.grad_norms, theirs.grad_norms)
    np.testing.assert_allclose(ours.grad_norms, theirs.grad_norms, rtol=5e-3)


def test_final_adapter(ours: OurRun, theirs: ReferenceRun) -> None:
    assert set(ours.final) == set(theirs.final)
    error = sum(float(((ours.final[n] - t) ** 2).sum()) for n, t in theirs.final.items()) ** 0.5
    moved = sum(float(((ours.initial[n] - t) ** 2).sum()) for n, t in theirs.final.items()) ** 0.5
    print(f"adapters differ by {error / moved:.2%} of PEFT's movement")
    assert error < 0.02 * moved


def test_peft_loads_our_export(ours: OurRun, model: RealModel, tmp_path: Path) -> None:
    """A large B, so that an adapter loaded under wrong names would show."""
    session = ours.session
    rng = np.random.default_rng(2)
    modules = session.layout.to_modules(session.parameters())
    for path, (a, b) in modules.items():
        modules[path] = (a, rng.normal(0, 0.15, b.shape).astype(np.float32))
    before = session.parameters()
    session.device.memory.write(session.adapter.parameters, session.layout.from_modules(modules))
    session.save(tmp_path)
    held_out = session.workload.train_examples[-2:]
    mine = [session.evaluate([example]).loss for example in held_out]
    session.device.memory.write(session.adapter.parameters, before)
    theirs = eval_losses(model.path, tmp_path, token_ids(model.path)["eval"])
    print("eval losses:", mine, theirs)
    np.testing.assert_allclose(mine, theirs, rtol=1e-3)
    unadapted = [session.evaluate([example], adapted=False).loss for example in held_out]
    assert min(abs(np.array(unadapted) - mine)) > 0.05
