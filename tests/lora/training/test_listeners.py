"""Who hears what of a run, in which order, and what asking for a stop does."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora.config.schema import load_config
from lora.shaders.device import Device
from lora.training.checkpoint import checkpoints
from lora.training.listeners import Listener, MetricsFile, Unhurried
from lora.training.metrics import EvalResult, Metrics, Sample
from lora.training.reporters import CSVFile
from lora.training.run import run_training
from lora.training.session import TrainingSession
from tests.support.tiny_run import write_run


class Diary(Listener):
    """Writes down what it hears, and asks for a stop when it hears of a step or evaluation."""

    def __init__(self, stop_at: str = "never") -> None:
        self.heard: list[str] = []
        self.error: BaseException | None = None
        self._stop_at = stop_at

    def _hear(self, what: str) -> bool:
        self.heard.append(what)
        return what == self._stop_at

    def started(self, session: TrainingSession) -> None:
        self._hear(f"started after {session.steps_done}")

    def step(self, metrics: Metrics) -> bool:
        return self._hear(f"step {metrics.step}")

    def evaluated(self, step: int, result: EvalResult) -> bool:
        assert result.loss > 0
        return self._hear(f"evaluated {step}")

    def saved(self, step: int, path: Path) -> None:
        assert (path / "adapter_model.safetensors").exists()
        self._hear(f"saved {step} {path.name}")

    def ended(self, error: BaseException | None) -> None:
        self.error = error
        self._hear("ended")


def session(folder: Path, device: Device, **train: object) -> TrainingSession:
    given = {"steps": 6, "eval_every": 3, "save_every": 3, **train}
    return TrainingSession(load_config(str(write_run(folder, train=given))), device=device)


def test_all_is_heard_in_order(tmp_path: Path, device: Device) -> None:
    first, second = Diary(), Diary()
    run_training(session(tmp_path, device), listeners=[first, second])
    assert first.heard == second.heard
    assert first.heard == [
        "started after 0",
        "step 1", "step 2", "step 3", "evaluated 3", "saved 3 step-000003",
        "step 4", "step 5", "step 6", "evaluated 6", "saved 6 step-000006",
        "saved 6 run", "ended",
    ]  # fmt: skip
    assert first.error is None
    again = Diary()
    for path in checkpoints(tmp_path / "run")[1:]:
        path.rename(tmp_path / path.name)
    run_training(session(tmp_path, device), resuming=True, listeners=[again])
    assert again.heard == ["started after 3", *first.heard[6:]]


@pytest.mark.parametrize("stop_at", ["step 1", "evaluated 3"])
def test_a_stop_that_is_asked_for(tmp_path: Path, device: Device, stop_at: str) -> None:
    """The step under way ends; the adapter is saved as at the end of a run of so many steps."""
    diary = Diary(stop_at)
    run = session(tmp_path, device, save_every=None)
    output = run_training(run, listeners=[Listener(), diary])
    done = run.steps_done
    assert done < 6 and diary.heard[-2:] == [f"saved {done} run", "ended"]
    assert f"step {done}" in diary.heard and f"step {done + 1}" not in diary.heard
    assert done == 3 or stop_at == "step 1"
    assert run.parameters().any() and (output / "adapter_config.json").exists()


def test_an_error_is_heard_by_all_who_began(tmp_path: Path, device: Device) -> None:
    class Failing(Listener):
        def step(self, metrics: Metrics) -> bool:
            raise RuntimeError("no more disk")

    first, last = Diary(), Diary()
    with pytest.raises(RuntimeError, match="no more disk"):
        run_training(session(tmp_path, device), listeners=[first, Failing(), last])
    assert str(first.error) == str(last.error) == "no more disk"
    assert first.heard == ["started after 0", "step 1", "ended"]
    assert last.heard == ["started after 0", "ended"]


def _metrics(step: int) -> Metrics:
    return Metrics(step, 0.0, 1.0, 1.0, 1e-4, 8, 8, 100.0, 0.01)


class Heard(Listener):
    """Notes what it is told of."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def step(self, metrics: Metrics) -> bool:
        self.told.append(metrics.step)
        return False

    def evaluated(self, step: int, result: EvalResult) -> bool:
        self.told.append("evaluated")
        return True

    def rewound(self, step: int) -> None:
        self.told.append("rewound")

    def sampled(self, step: int, samples: Sequence[Sample]) -> None:
        self.told.append("sampled")

    def ended(self, error: BaseException | None) -> None:
        self.told.append("ended")


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (lambda who: who.evaluated(3, EvalResult(1.0, 2.0, 0.5, 0.0, 0, 1, 1, 0)), ["evaluated"]),
        (lambda who: who.rewound(1), ["rewound"]),
        (lambda who: who.sampled(3, []), ["sampled"]),
        (lambda who: who.ended(None), ["ended"]),
        (lambda who: who.evaluating(3, 1, 2), []),
        (lambda who: who.saving(3), []),
    ],
    ids=["evaluated", "rewound", "sampled", "ended", "evaluating", "saving"],
)
def test_steps_that_wait_come_before_all_else(
    event: Callable[[Listener], object], told: list[object]
) -> None:
    heard = Heard()
    unhurried = Unhurried(heard, seconds=1000.0)
    for step in (1, 2, 3):
        assert not unhurried.step(_metrics(step))
    assert heard.told == [1]  # the first at once
    assert event(unhurried) is (True if told == ["evaluated"] else None)
    assert heard.told == [1, 2, 3, *told]


def test_all_else_is_passed_on(tmp_path: Path) -> None:
    """Whatever a listener may hear, one behind another hears as well."""
    told: list[str] = []

    class All(Listener):
        pass

    # `several` is how steps that waited come, and has a test of its own.
    names = [name for name in vars(Listener) if not name.startswith("_") and name != "several"]
    for name in names:
        setattr(All, name, lambda self, *_, name=name: told.append(name))
    unhurried = Unhurried(All())
    for name in names:
        n_arguments = Listener.__dict__[name].__code__.co_argcount - 1
        getattr(unhurried, name)(*[None] * n_arguments)
    assert told == names


def test_several_steps_are_written_as_one_by_one(tmp_path: Path) -> None:
    """By files and by whom only `step` of is known, whether they waited or not."""
    workload = SimpleNamespace(eval_sets=(), eval_examples=())
    run = SimpleNamespace(steps_done=0, workload=workload)
    steps = [replace(_metrics(step), loss=1 / step) for step in range(1, 6)]
    written = {}
    for way in ("one by one", "several", "waiting"):
        folder = tmp_path / way
        folder.mkdir()
        heard = Heard()
        for listener in (MetricsFile(folder / "metrics.jsonl"), CSVFile(folder), heard):
            told = Unhurried(listener, seconds=1000.0) if way == "waiting" else listener
            told.started(run)
            if way == "several":
                told.several(steps)
            else:
                for metrics in steps:
                    told.step(metrics)
            told.ended(None)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        written[way] = files, [told for told in heard.told if told != "ended"]
    assert written["several"] == written["waiting"] == written["one by one"]
    files, told_of = written["several"]
    assert files["metrics.jsonl"].count(b"\n") == 5 and files["metrics.csv"].count(b"\n") == 6
    assert told_of == [1, 2, 3, 4, 5]


def test_steps_wait_no_longer_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr("lora.training.listeners.time.monotonic", lambda: now[0])
    heard = Heard()
    unhurried = Unhurried(heard, seconds=0.5)
    for step, at in ((1, 10.0), (2, 10.2), (3, 10.4), (4, 10.6), (5, 10.7)):
        now[0] = at
        unhurried.step(_metrics(step))
    assert heard.told == [1, 2, 3, 4]


def test_metrics_are_there_before_the_checkpoint_that_a_run_goes_on_with(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed between the two takes these steps no second time."""
    found = []

    def looked(run: TrainingSession, output: Path) -> Path:
        lines = (output / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines if "grad_norm" in line]
        found.append((run.steps_done, steps))
        return output

    monkeypatch.setattr("lora.training.saving.save_checkpoint", looked)
    run_training(session(tmp_path, device, save_every=2))
    assert len(found) > 2
    for done, steps in found:
        assert steps == list(range(1, done + 1))
