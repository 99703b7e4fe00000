"""Steps whose gradients overflow f16 by the loss scale alone: run again, and none of them lost."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from lora import TrainingSession, run_training
from lora.config.schema import load_config
from lora.optim.guard import Scaling
from lora.shaders.choice import say_once
from lora.shaders.device import Device
from lora.shaders.errors import LoraError
from lora.training import leading
from lora.training.checkpoint import checkpoints, save_checkpoint
from lora.training.communicator import Communicator
from lora.training.leading import follow, led
from lora.training.metrics import Metrics
from lora.training.under_way import Step, StepsUnderWay
from tests.support.half_tensors import needs_halves
from tests.support.thread_ranks import ThreadRanks
from tests.support.tiny_run import write_run

ADAPTER = "adapter_model.safetensors"
# It doubles so soon that steps 3, 4 and 8 of ten overflow, and the last of these twice.
RESTLESS, TRIES = Scaling(begin=32.0, growth_interval=2), [0, 0, 1, 1, 0, 0, 0, 2, 0, 0]
Run = Callable[[TrainingSession, Step], Any]


class KilledError(BaseException):
    """Ends a run as a kill does: nothing is saved on the way out."""


@pytest.fixture(autouse=True)
def half(device: Device) -> None:
    needs_halves(device.facts)
    say_once.cache_clear()


def write_steep(folder: Path, **sections: dict[str, Any]) -> Path:
    """A run in f16 of a model whose gradients overflow at 1024, 512 and 128, and not at 8."""
    train = {"precision": "f16", "batch_size": 2, "learning_rate": 1e-3, "schedule": "constant"}
    train |= sections.pop("train", {})
    path = write_run(folder, train=train, **sections)
    reader = gguf.GGUFReader(folder / "model.gguf", "r+")
    norm = next(tensor for tensor in reader.tensors if tensor.name == "output_norm.weight")
    norm.data[:] *= 1e4
    reader.data.flush()
    return path


def steps_of(output: Path) -> list[dict[str, Any]]:
    """The steps in metrics.jsonl, but for what is measured."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    measured = ("seconds", "tokens_per_second", "slowest_rank", "communication")
    return [{k: v for k, v in n.items() if k not in measured} for n in lines if "loss" in n]


def retried(metrics: list[Metrics]) -> list[int]:
    assert not any(one.skipped for one in metrics)
    return [one.retried for one in metrics]


def test_all_steps_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in f32, to f16's rounding; the first is tried four times, and nobody is told of skips."""
    path = write_steep(tmp_path)
    found = {}
    for precision in ("f32", "f16"):
        output = tmp_path / precision
        names = [f"train.precision={precision}", f"output={output}"]
        with TrainingSession.from_config(path, names) as session, caplog.at_level(logging.WARNING):
            before = session.parameters()
            run_training(session)
            found[precision] = steps_of(output), session.parameters() - before, session.guard()
    (wanted, way, _), (steps, own_way, guard) = found["f32"], found["f16"]
    assert [line.pop("retried", 0) for line in steps] == [3] + [0] * 9
    assert (guard.scale, guard.good_steps, guard.skipped, guard.held) == (8.0, 10, 0, False)
    assert [line.keys() for line in steps] == [line.keys() for line in wanted]
    assert [line["tokens"] for line in steps] == [line["tokens"] for line in wanted]
    assert [line["learning_rate"] for line in steps] == [line["learning_rate"] for line in wanted]
    losses, others = ([line["loss"] for line in lines] for lines in (steps, wanted))
    assert others[-1] < 0.9 * others[0]
    np.testing.assert_allclose(losses, others, rtol=2e-3)
    assert np.linalg.norm(own_way - way) < 0.1 * np.linalg.norm(way)
    assert not caplog.messages


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {
            "adapter": {"dropout": 0.3},
            "train": {"gradient_accumulation": 2, "neftune_noise_alpha": 5.0, "recompute": "on"},
        },
        {"adapter": {"layers": {"last": 1}}, "train": {"optimizer": "adamw_8bit"}},
        {"adapter": {"variant": "dora"}},
    ],
    ids=["plain", "dropout, noise, accumulation", "a frozen prefix, 8 bits", "DoRA"],
)
def test_tries_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, dict[str, Any]]
) -> None:
    """The bytes of a run that begins with the scale that these find."""
    path = write_steep(tmp_path, **sections)
    found = []
    for begin in (1024.0, 8.0):
        monkeypatch.setattr("lora.training.programs.SCALING", Scaling(begin=begin))
        with TrainingSession.from_config(path) as session:
            metrics = list(session.train())
            found.append((session.parameters(), session.moments(), session.guard(), metrics))
    (one, moments, guard, tried), (other, moments_then, guard_then, plain) = found
    assert retried(tried) == [3] + [0] * (len(plain) - 1) and not any(retried(plain))
    assert one.tobytes() == other.tobytes() and np.abs(one).max() > 0
    assert moments.keys() == moments_then.keys()
    assert all(moments[name].tobytes() == moments_then[name].tobytes() for name in moments)
    assert guard == guard_then
    for mine, theirs in zip(tried, plain, strict=True):
        assert as_plain(mine) == as_plain(theirs)


def as_plain(metrics: Metrics) -> Metrics:
    return replace(metrics, retried=0, seconds=0.0, tokens_per_second=0.0)


def test_whoever_waits_for_results_gets_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step at a time or three ahead, by a loop of one's own or not, also one that is left."""
    monkeypatch.setattr("lora.training.programs.SCALING", RESTLESS)
    path = write_steep(tmp_path)

    def by_train(session: TrainingSession) -> list[int]:
        return retried(list(session.train()))

    def paused(session: TrainingSession) -> list[int]:
        found = [m for m in session.steps(pause=lambda: True) if m is not None]
        return retried(found)

    def by_hand(session: TrainingSession) -> list[int]:
        assert session.stream is not None
        for batches in session.stream:
            session.step(batches)
        return retried(session.finished_steps(wait=True))

    def left(session: TrainingSession) -> list[int]:
        """After the results of three; what was under way counts, too."""
        metrics = [m for _, m in zip(range(3), session.train(), strict=False)]
        done = session.steps_done
        assert session.guard().good_steps < 2 and session.steps_done == done
        metrics += session.finished_steps()
        assert [m.step for m in metrics] == list(range(1, done + 1))
        return retried([*metrics, *session.train()])

    found = []
    for way in (by_train, paused, by_hand, left):
        with TrainingSession.from_config(path) as session:
            found.append((way(session), session.parameters().tobytes(), session.guard()))
    assert found[0][0] == TRIES
    assert all(one == found[0] for one in found[1:])


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int, BaseException], None]]:
    """Ends runs where a step is given to the device for its n-th try."""
    run: Run = TrainingSession._run_step

    def at(number: int, tries: int, error: BaseException) -> None:
        def ends(session: TrainingSession, step: Step) -> Any:
            if (step.number, step.tries) == (number, tries):
                raise error
            return run(session, step)

        monkeypatch.setattr(TrainingSession, "_run_step", ends)

    yield at
    monkeypatch.setattr(TrainingSession, "_run_step", run)


@pytest.mark.parametrize(
    ("number", "tries", "saved"),
    [(3, 1, [2]), (4, 1, [2]), (5, 0, [2, 4]), (8, 1, [4, 6]), (8, 2, [4, 6]), (9, 0, [6, 8])],
)
def test_a_kill_in_the_middle_of_a_retry(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill: Callable[[int, int, BaseException], None],
    number: int,
    tries: int,
    saved: list[int],
) -> None:
    """Who resumes ends in the same bytes and lines."""
    monkeypatch.setattr("lora.training.programs.SCALING", RESTLESS)
    path = write_steep(tmp_path, train={"save_every": 2, "keep_checkpoints": 2})
    with TrainingSession.from_config(path, [f"output={tmp_path / 'whole'}"]) as session:
        whole = run_training(session)
    kill(number, tries, KilledError())
    with TrainingSession.from_config(path) as session, pytest.raises(KilledError):
        run_training(session)
    names = [place.name for place in checkpoints(tmp_path / "run")]
    assert names == [f"step-{step:06d}" for step in saved]
    kill(0, 0, KilledError())  # none
    with TrainingSession.from_config(path) as session:
        output = run_training(session, resuming=True)
    assert (output / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert steps_of(output) == steps_of(whole)
    assert [line.get("retried", 0) for line in steps_of(whole)] == TRIES
    states = [json.loads((checkpoints(o)[-1] / "state.json").read_text()) for o in (output, whole)]
    assert states[0]["guard"] == states[1]["guard"]


def test_an_error_in_a_retry_saves_what_has_counted(
    tmp_path: Path, kill: Callable[[int, int, BaseException], None]
) -> None:
    """What is under way is run again before it is saved, or is not saved."""
    path = write_steep(tmp_path)
    kill(3, 0, LoraError("spilled"))
    with TrainingSession.from_config(path) as session, pytest.raises(LoraError, match="spilled"):
        run_training(session)
    (saved,) = checkpoints(tmp_path / "run")
    kill(0, 0, KilledError())
    with TrainingSession.from_config(path, ["train.steps=2", f"output={tmp_path}/two"]) as session:
        two = run_training(session)
    assert saved.name == "step-000002"
    assert (saved / ADAPTER).read_bytes() == (two / ADAPTER).read_bytes()


def test_an_error_between_steps_that_run_again_saves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Step 2 was done, and what was held before it has counted by now; it hasn't itself."""
    path, run, begun = write_steep(tmp_path), TrainingSession._run_step, []

    def ends(session: TrainingSession, step: Step) -> Any:
        begun.append(step.number)
        if begun.count(2) == 2:
            raise LoraError("spilled")
        return run(session, step)

    # However fast the device is, the host hears of step 1 after it gave it step 2.
    held = StepsUnderWay.held.fget
    assert held is not None
    late = property(lambda steps: len(steps._pending) > 1 and held(steps))
    monkeypatch.setattr(StepsUnderWay, "held", late)
    monkeypatch.setattr(TrainingSession, "_run_step", ends)
    with (
        caplog.at_level(logging.WARNING),
        TrainingSession.from_config(path) as session,
        pytest.raises(LoraError, match="spilled"),
    ):
        run_training(session)
    assert any("what is there lacks them" in line for line in caplog.messages)
    assert begun[-4:] == [1, 1, 1, 2] and not checkpoints(tmp_path / "run")


def test_what_is_held_is_not_saved(tmp_path: Path) -> None:
    """Of processes that have gone apart none can run a step again."""
    path = write_steep(tmp_path)
    with TrainingSession.from_config(path) as session:
        assert session.stream is not None
        session.step(next(session.stream))
        session.leave_steps()
        with pytest.raises(LoraError, match="changed nothing; they are not saved"):
            save_checkpoint(session, tmp_path / "run")
    assert not checkpoints(tmp_path / "run")


@pytest.fixture(scope="module")
def devices() -> Iterator[list[Device]]:
    """One a rank: wgpu-native can't open one while another thread compiles."""
    opened = [Device() for _ in range(2)]
    for device in opened:
        device.facts = replace(device.facts, matrix_shapes=())
    yield opened
    for device in opened:
        device.close()


@pytest.mark.parametrize("comm_dtype", ["f32", "f16"])
def test_several_processes_decide_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: list[Device], comm_dtype: str
) -> None:
    """Led ones: the same tries and the same bytes, whether results are waited for or not."""
    monkeypatch.setattr("lora.training.programs.SCALING", RESTLESS)
    monkeypatch.setattr(leading, "_signals", lambda _: nullcontext())  # threads have none
    train = {"tuning": "off", "comm_dtype": comm_dtype, "batch_size": 1, "steps": 10}
    config = load_config(str(write_steep(tmp_path, train=train)))

    def trained(device: Device, communicator: Communicator, wait: bool) -> tuple[Any, ...]:
        with TrainingSession(config, device=device, communicator=communicator) as session:
            metrics = []
            if communicator.rank:
                assert follow(session) == 0
            else:
                with led(session):
                    metrics = [m for m in session.steps(lambda: wait) if m is not None]
            return session.parameters().tobytes(), session.guard(), retried(metrics)

    found = []
    for wait in (False, True):
        with ThreadPoolExecutor(2) as pool:
            ranks = ThreadRanks(2).communicators
            found.append(list(pool.map(trained, devices, ranks, [wait] * 2)))
    assert found[0] == found[1]
    (adapter, guard, tries), (other, others, _) = found[0]
    assert adapter == other and guard == others
    assert tries == TRIES


def test_devices_that_do_not_agree_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: list[Device]
) -> None:
    """One holds a step that the other's device let pass."""
    monkeypatch.setattr("lora.training.programs.SCALING", Scaling(begin=8.0))
    config = load_config(str(write_steep(tmp_path, train={"tuning": "off", "batch_size": 1})))
    ranks = ThreadRanks(2)

    def trained(device: Device, communicator: Communicator) -> str:
        with TrainingSession(config, device=device, communicator=communicator) as session:
            if communicator.rank == 0:
                session.set_guard(replace(session.guard(), held=True))
            assert session.stream is not None
            try:
                for batches in session.stream:
                    session.step(batches)
            except (LoraError, threading.BrokenBarrierError) as error:
                ranks.barrier.abort()  # the other waits for this one
                return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        _, said = pool.map(trained, devices, ranks.communicators)
    assert "one of them computes wrongly" in said


def test_an_ordinary_step_waits_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is as far ahead of the device as it was: only what is run again is waited for."""
    asked: list[bool] = []
    arrived = StepsUnderWay._arrived

    def noted(steps: StepsUnderWay, *, wait: bool) -> None:
        asked.append(wait)
        arrived(steps, wait=wait)

    monkeypatch.setattr(StepsUnderWay, "_arrived", noted)
    for path, tries in ((write_run(tmp_path, train={"precision": "f16"}), 0), (None, 3)):
        path = write_steep(tmp_path) if path is None else path
        with TrainingSession.from_config(path) as session:
            assert session.stream is not None
            asked.clear()
            for batches in session.stream:
                session.step(batches)
            assert len(asked) >= 8 and sum(asked) == (1 + tries if tries else 0)
            assert session.finished_steps(wait=True)[0].retried == tries
