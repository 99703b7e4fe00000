"""Several sessions on one device, in turn and side by side, and what closing gives back."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lora.config.schema import Config, load_config
from lora.data.batches import Batch
from lora.forward.plans.matmul_tiles import choose_plan
from lora.shaders.device import Device
from lora.shaders.errors import InputError, LoraError
from lora.shaders.readback import ReadbackRing
from lora.training.session import TrainingSession
from tests.support.plans import gpu as gpu  # a fixture
from tests.support.plans import second_choices, use_tuner
from tests.support.tiny_run import write_run

MOST_GROWTH = 20 << 20  # bytes of the process between the 10th and the 100th session


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(str(write_run(tmp_path)), ["train.epochs=1"])


@pytest.fixture
def own_device() -> Iterator[Device]:
    """A device that no other test has put anything on."""
    with Device() as device:
        yield device


def resident_bytes() -> int:
    """Of this process, as Linux tells it; elsewhere the test is skipped."""
    path = Path("/proc/self/statm")
    if not path.exists():
        pytest.skip("the system has no /proc")
    return int(path.read_text().split()[1]) * 4096


def two_steps(session: TrainingSession) -> bytes:
    assert session.stream is not None
    for _, batches in zip(range(2), session.stream, strict=False):
        session.step(batches)
    session.finished_steps(wait=True)
    return session.parameters().tobytes()


def test_a_hundred_sessions_in_turn(config: Config, own_device: Device) -> None:
    """All memory comes back, the device's and the host's, and all train the same."""
    found, resident = set(), []
    for _ in range(100):
        with TrainingSession(config, device=own_device) as session:
            found.add(two_steps(session))
        assert own_device.allocated == {}
        gc.collect()
        resident.append(resident_bytes())
    assert len(found) == 1
    assert resident[99] - resident[9] < MOST_GROWTH, resident[9::10]


def test_two_sessions_side_by_side(config: Config, own_device: Device) -> None:
    """Step by step in turns, each trains as it does alone; the one that stays goes on."""
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 5})})
    alone = []
    for one in (config, other):
        with TrainingSession(one, device=own_device) as session:
            losses = [metrics.loss for metrics in session.train()]
            alone.append((losses, session.parameters().tobytes()))
    first, second = (TrainingSession(one, device=own_device) for one in (config, other))
    pairs = list(zip(first.train(), second.train(), strict=True))
    assert [a.loss for a, _ in pairs] == alone[0][0] != alone[1][0]
    assert [b.loss for _, b in pairs] == alone[1][0]
    assert first.parameters().tobytes() == alone[0][1]
    both = own_device.allocated.total()
    first.close()
    assert own_device.allocated.total() == both / 2
    assert second.parameters().tobytes() == alone[1][1]
    assert second.generate("Say", max_tokens=2, adapted=False) is not None
    second.close()
    assert own_device.allocated == {}


def test_what_is_closed_says_so(config: Config) -> None:
    session = TrainingSession(config)
    answer = session.generate("Say", max_tokens=2)
    assert isinstance(answer, str)
    session.close()
    assert session.device.allocated == {}  # it was the session's own
    for use in (
        session.parameters,
        lambda: list(session.train()),
        session.evaluate,
        lambda: session.generate("Say", max_tokens=2),
    ):
        with pytest.raises(LoraError, match="This was closed"):
            use()
    session.close()  # once more does no harm


def test_a_session_that_cannot_be_opened_leaves_nothing(config: Config, own_device: Device) -> None:
    """Its model was there, and the memory ends after it."""
    own_device.facts = replace(own_device.facts, memory_limit=300_000)
    with pytest.raises(InputError, match="does not fit"):
        TrainingSession(config, device=own_device)
    assert own_device.allocated == {}


def test_an_interrupted_evaluation_leaves_nothing_for_the_next(
    config: Config, own_device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its results are still on their way when the next one asks for its own."""
    train = config.train.model_copy(update={"batch_size": 1})
    with TrainingSession(config.model_copy(update={"train": train}), device=own_device) as session:
        examples = session.workload.train_examples
        wanted = session.evaluate(examples)

        def interrupted(batch: Batch, cache: object, *, adapted: bool) -> None:
            if batch.examples == [examples[-3].index]:  # the third
                raise KeyboardInterrupt
            enter(batch, None, adapted=adapted)

        enter = session._enter
        with monkeypatch.context() as patch:
            patch.setattr(session._evaluator, "_enter", interrupted)
            patch.setattr(ReadbackRing, "ready", lambda *_, wait=False: [])  # a slow device
            with pytest.raises(KeyboardInterrupt):
                session.evaluate(examples[::-1])
        assert session.evaluate(examples) == wanted


def test_programs_recorded_again_leave_nothing_behind(
    tmp_path: Path, gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a run that goes on with other plans; evaluation and text among them."""
    use_tuner(monkeypatch, second_choices)
    path = write_run(tmp_path, adapter={"layers": {"last": 1}}, train={"epochs": 1})
    with TrainingSession(load_config(str(path)), device=gpu) as session:
        model = {r.product: choose_plan(r.space(gpu.facts)) for r in session.plan.requests}
        memory = []
        for plans in (model, dict(session.plans), model):
            session.use_plans(plans)
            session.evaluate()
            session.generate("Say", max_tokens=1)
            memory.append(dict(gpu.allocated))
        assert memory[0] == memory[2] and memory[0]["frozen prefix"] > 0
