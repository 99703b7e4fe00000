"""Every architecture against what transformers and PEFT gave for tiny random models.

tests/parity/record_tiny.py recorded it; `make parity` compares all values live, and the judges
among themselves.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest

from lora.training.session import TrainingSession
from tests.support.recorded_models import COLUMNS, Recorded, load_record, signed_sums
from tests.support.tiny_models import TINY_MODELS
from tests.support.tiny_ours import gradients, logits, open_session

RECORDED = load_record()


# The programs without an adapter are kernels of their own, and each costs a compilation: a family
# of every kind records them, the others compute the same with an adapter of zeros.
WITHOUT_ADAPTER = ("llama", "llama_odd", "gemma2_q8_0", "phi3", "gemma3")


def recorded_of(name: str) -> Recorded:
    """What the judges gave for a model."""
    if name not in RECORDED:
        pytest.fail(f"{name} is not recorded yet: python tests/parity/record_tiny.py")
    return RECORDED[name]


@contextmanager
def no_adapter(session: TrainingSession) -> Iterator[None]:
    """Zeros for A and B, for a while."""
    parameters = session.adapter.parameters
    before = session.device.memory.read(parameters)
    session.device.memory.write(parameters, np.zeros_like(before))
    yield
    session.device.memory.write(parameters, before)


@pytest.fixture(scope="module", params=TINY_MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def session(name: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], TrainingSession]:
    """Opens the session once, in the test: a family that fails to open fails, and is no error."""
    folder = tmp_path_factory.mktemp(name)

    @cache
    def opened() -> TrainingSession:
        model = TINY_MODELS[name]
        model.write_gguf(folder / "model.gguf")
        model.write_adapter(folder / "adapter")
        return open_session(model, folder / "model.gguf", folder / "adapter", recompute="on")

    return opened


@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapted"])
def test_logits(name: str, session: Callable[[], TrainingSession], adapted: bool) -> None:
    of_judge = recorded_of(name)
    recorded = of_judge.adapted_logits if adapted else of_judge.logits
    if adapted or name in WITHOUT_ADAPTER:
        ours = logits(session(), adapted=adapted)[:, COLUMNS]
    else:
        with no_adapter(session()):
            ours = logits(session(), adapted=True)[:, COLUMNS]
    # transformers in f32 is itself up to 4e-5 away from f64, at logits of up to 20.
    np.testing.assert_allclose(ours, recorded, rtol=0, atol=1e-4)


def test_loss_and_gradients(name: str, session: Callable[[], TrainingSession]) -> None:
    recorded, ours = recorded_of(name), gradients(session())
    assert ours.loss == pytest.approx(recorded.loss, rel=1e-5)
    assert len(ours.gradients) == len(recorded.gradient_norms)
    for index, (tensor, gradient) in enumerate(sorted(ours.gradients.items())):
        difference = signed_sums(tensor, gradient) - recorded.gradient_sums[index]
        error = float(np.sqrt((difference**2).mean()) / recorded.gradient_norms[index])
        # f32 sums in another order give 1e-5; PEFT in f32 is 5e-6 away from f64.
        assert error < 1e-4, f"{tensor}: relative error {error:.1e}"
