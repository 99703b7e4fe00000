"""What happens between a run's steps: evaluations, the best adapter, early stops, samples."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import yaml

from lora import InputError, Listener, TrainingSession, run_training
from lora.config.schema import load_config
from lora.shaders.device import Device
from lora.training.best import EarlyStop, better
from lora.training.checkpoint import checkpoints
from lora.training.course import Interrupted
from lora.training.history import History
from lora.training.metrics import EvalResult, Metrics, Sample, StepClock
from lora.training.workload import Workload
from tests.support.tiny_run import write_run

ADAPTER = "adapter_model.safetensors"


def opened(folder: Path, device: Device, *overrides: str, **train: Any) -> TrainingSession:
    path = write_run(folder, train={"steps": 8, "save_every": None, **train})
    return TrainingSession.from_config(path, overrides, device=device)


def evaluations(output: Path) -> list[dict[str, Any]]:
    return History.read(output / "metrics.jsonl").evaluations


def scripted(session: TrainingSession, losses: dict[int, float]) -> None:
    """Evaluations that come to given losses after given steps."""

    def evaluate(**_: object) -> EvalResult:
        loss = losses[session.steps_done]
        return EvalResult(loss, 2.0, 1 - loss, 0.0, 0, 3, 9, 0)

    session.evaluate = evaluate  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        ({}, [8]),
        ({"eval_at_start": True}, [0, 8]),
        ({"eval_every": 3, "eval_at_start": True}, [0, 3, 6, 8]),
        ({"eval_every": "epoch"}, [4, 8]),  # ten rows, three at a time
        ({"eval_every": "0.5 epochs"}, [2, 4, 6, 8]),
        ({"eval_every": "0.3 epochs"}, [2, 3, 4, 5, 6, 8]),
    ],
)
def test_when_it_is_evaluated(
    tmp_path: Path, device: Device, train: dict[str, Any], steps: list[int]
) -> None:
    session = opened(tmp_path, device, **train)
    lines = evaluations(run_training(session))
    assert [line["step"] for line in lines] == steps
    assert set(lines[0]) == {
        "step", "eval_loss", "eval_perplexity", "eval_accuracy", "eval_exact_match", "eval_seconds"
    }  # fmt: skip
    assert lines[-1]["eval_loss"] == session.evaluate().loss


def test_an_evaluation_changes_nothing_of_the_training(tmp_path: Path, device: Device) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = run_training(opened(tmp_path / "a", device, "data.eval=null"))
    watched = opened(tmp_path / "b", device, eval_every=1, eval_at_start=True,
                     sample_prompts=["say"], sample_every=2, sample_tokens=2)  # fmt: skip
    assert (run_training(watched) / ADAPTER).read_bytes() == (plain / ADAPTER).read_bytes()


def test_named_sets_and_samples_of_them(tmp_path: Path, device: Device) -> None:
    """Each set's figures are its own; those without a name are of all together."""
    path = write_run(tmp_path)
    config = yaml.safe_load(path.read_text())
    config["data"]["eval"] = {
        "held-out": str(tmp_path / "eval.jsonl"),
        "seen": {"path": str(tmp_path / "train.jsonl"), "max_samples": 7},
    }
    path.write_text(yaml.safe_dump(config))
    with TrainingSession.from_config(path, device=device) as session:
        result = session.evaluate()
        assert [(n, r.n_examples) for n, r in result.sets.items()] == [("held-out", 3), ("seen", 7)]
        alone = session.evaluate(session.workload.eval_examples[3:])
        assert result.sets["seen"] == alone
        weights = [r.n_tokens for r in result.sets.values()]
        losses = [r.loss for r in result.sets.values()]
        np.testing.assert_allclose(result.loss, np.average(losses, weights=weights), rtol=1e-12)
        assert {"eval_loss", "eval_seen_loss", "eval_held-out_accuracy"} <= set(result.metrics())
    few = ["train.eval_samples=2", "train.best=eval_seen_loss"]
    with TrainingSession.from_config(path, few, device=device) as session:
        result = session.evaluate()
        assert [r.n_examples for r in result.sets.values()] == [2, 2]
        rows = session.workload.eval_examples
        assert session.workload.eval_summary.n_rows == 4 and len(rows) == 4
        chosen = [e.ids.tolist() for e in rows[2:]]
        every = [e.ids.tolist() for e in session.workload.train_examples[:7]]
        assert all(ids in every for ids in chosen)
    again = TrainingSession.from_config(path, few, device=device)
    assert [e.ids.tolist() for e in again.workload.eval_examples[2:]] == chosen
    # Who evaluates alone evaluates all.
    bare = TrainingSession.from_config(path, few, train=False, device=device)
    assert bare.evaluate().n_examples == 10


def test_an_eval_set_of_which_nothing_is_trained(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    (tmp_path / "empty.jsonl").write_text('{"prompt": "a", "completion": ""}\n')
    config = yaml.safe_load(path.read_text())
    config["data"]["append_eos"] = "off"
    config["data"]["eval"] = {
        "good": str(tmp_path / "eval.jsonl"), "bad": str(tmp_path / "empty.jsonl")
    }  # fmt: skip
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=r"data\.eval\.bad: no token of its rows is trained"):
        TrainingSession.from_config(path)


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / ADAPTER)


@pytest.mark.parametrize(
    ("metric", "best_step"), [("auto", 4), ("eval_accuracy", 4), ("eval_perplexity", 2), ("off", 0)]
)
def test_the_best_adapter_is_kept(
    tmp_path: Path, device: Device, metric: str, best_step: int
) -> None:
    session = opened(tmp_path, device, eval_every=2, save_every=2, keep_checkpoints=9, best=metric)
    scripted(session, {2: 0.9, 4: 0.5, 6: 0.7, 8: 0.5})
    output = run_training(session)
    if metric == "off":
        assert not (output / "best").exists()
        return
    record = json.loads((output / "best" / "best.json").read_text())
    assert record["step"] == best_step
    assert record["metric"] == ("eval_loss" if metric == "auto" else metric)
    best, then = weights_of(output / "best"), weights_of(checkpoints(output)[best_step // 2 - 1])
    assert all((best[name] == then[name]).all() for name in then)
    assert (output / "best" / "README.md").exists()


def test_the_best_is_loaded_at_the_end(tmp_path: Path, device: Device) -> None:
    """The last checkpoint is of the last step all the same: the run can go on."""
    train = {"eval_every": 2, "load_best_model_at_end": True}
    session = opened(tmp_path, device, **train)
    scripted(session, {2: 0.9, 4: 0.5, 6: 0.7, 8: 0.6})
    output = run_training(session)
    assert (output / ADAPTER).read_bytes() == (output / "best" / ADAPTER).read_bytes()
    (last,) = checkpoints(output)
    assert last.name == "step-000008"
    assert (last / ADAPTER).read_bytes() != (output / ADAPTER).read_bytes()
    # A resumed run knows the best of before, and loads it where it finds no better one.
    longer = TrainingSession.from_config(
        tmp_path / "config.yaml", ["train.steps=10"], device=device
    )
    scripted(longer, {10: 0.8})
    best = (output / "best" / ADAPTER).read_bytes()
    run_training(longer, resuming=True)
    assert (output / ADAPTER).read_bytes() == (output / "best" / ADAPTER).read_bytes() == best
    assert [line["step"] for line in evaluations(output)] == [2, 4, 6, 8, 10]


def test_a_best_that_cannot_be_written_ends_no_run(
    tmp_path: Path,
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With load_best_model_at_end it is in memory all the same."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora.training.best.new_directory", full)
    session = opened(tmp_path, device, eval_every=4, load_best_model_at_end=True, save_every=4)
    scripted(session, {4: 0.5, 8: 0.6})
    output = run_training(session)
    assert "No space left on device): the best adapter so far, of step 4" in caplog.text
    then = weights_of(checkpoints(output)[0])
    assert all((weights_of(output)[name] == then[name]).all() for name in then)


def test_a_signal_ends_an_evaluation(tmp_path: Path, device: Device) -> None:
    """The one before the first step, too: then no step comes, and the run can be resumed."""

    class Interrupts(Listener):
        def evaluating(self, step: int, done: int, total: int) -> None:
            if step == at and not done:
                os.kill(os.getpid(), signal.SIGINT)

    for at in (0, 4):
        session = opened(tmp_path, device, eval_every=4, eval_at_start=True)
        with pytest.raises(Interrupted) as stopped:
            run_training(session, listeners=[Interrupts()])
        assert stopped.value.checkpoint.name == f"step-00000{at}" and session.steps_done == at
        output = tmp_path / "run"
        assert [line["step"] for line in evaluations(output)] == [0][: at // 4]
    path = tmp_path / "config.yaml"
    run_training(TrainingSession.from_config(path, device=device), resuming=True)
    whole = TrainingSession.from_config(path, [f"output={tmp_path / 'whole'}"], device=device)
    assert (run_training(whole) / ADAPTER).read_bytes() == (output / ADAPTER).read_bytes()


def test_a_stop_before_the_first_step(tmp_path: Path, device: Device) -> None:
    class Stop(Listener):
        def evaluated(self, step: int, result: EvalResult) -> bool:
            return True

    session = opened(tmp_path, device, eval_at_start=True)
    run_training(session, listeners=[Stop()])
    assert session.steps_done == 0


class Heard(Listener):
    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def improved(self, step: int, metric: str, value: float) -> None:
        self.events.append(("improved", step, value))

    def evaluated(self, step: int, result: EvalResult) -> bool:
        self.events.append(("evaluated", step))
        return False

    def stopped_early(self, step: int, evaluations: int) -> None:
        self.events.append(("stopped", step, evaluations))

    def evaluating(self, step: int, done: int, total: int) -> None:
        self.events.append(("evaluating", step, done, total))

    def sampled(self, step: int, samples: Sequence[Sample]) -> None:
        self.events.append(("sampled", step, [s.prompt for s in samples]))


def test_a_run_stops_early(tmp_path: Path, device: Device) -> None:
    train = {"eval_every": 1, "early_stopping_patience": 2}
    losses = {1: 0.9, 2: 0.8, 3: 0.85, 4: 0.7, 5: 0.75, 6: 0.71, 7: 0.1, 8: 0.1}
    session, heard = opened(tmp_path, device, **train), Heard()
    scripted(session, losses)
    output = run_training(session, listeners=[heard])
    assert session.steps_done == 6
    assert heard.events[-2:] == [("evaluated", 6), ("stopped", 6, 2)]
    assert [p.name for p in checkpoints(output)] == ["step-000006"]
    assert json.loads((output / "best" / "best.json").read_text())["step"] == 4


def test_patience_outlives_a_stop(tmp_path: Path, device: Device) -> None:
    """A run that is resumed has counted as one that was never stopped."""
    train = {"eval_every": 1, "early_stopping_patience": 3}

    class Stop(Listener):
        def step(self, metrics: Metrics) -> bool:
            return metrics.step == 3

    losses = dict(enumerate([0.5, 0.9, 0.8, 0.7, 0.6, 0.55, 0.5, 0.4], start=1))
    first = opened(tmp_path, device, **train)
    scripted(first, losses)
    run_training(first, listeners=[Stop()])
    done = first.steps_done
    assert done == 3
    second = TrainingSession.from_config(tmp_path / "config.yaml", device=device)
    scripted(second, losses)
    run_training(second, resuming=True)
    assert second.steps_done == 4  # the second, third and fourth brought no gain


def test_gains_count_above_a_threshold() -> None:
    """As in transformers: any value may be the best, a gain is one above the threshold."""
    stop = EarlyStop("eval_loss", 2, 0.1)
    assert [stop.stops(v) for v in (1.0, 0.95, 0.85, 0.7, 0.65, 0.6)] == [
        False, False, True, False, False, True
    ]  # fmt: skip
    assert not better("eval_loss", float("nan"), 1.0) and better("eval_loss", 1.0, float("nan"))
    assert better("eval_seen_exact_match", 0.5, 0.4) and not better("eval_perplexity", 0.5, 0.4)


def test_train_obeys_the_config(tmp_path: Path, device: Device) -> None:
    """As run_training, but that only checkpoints are written."""
    heard = Heard()
    session = opened(
        tmp_path, device, eval_every=2, eval_at_start=True, save_every=5, sample_every=4,
        sample_prompts=["say ab "], sample_tokens=2, early_stopping_patience=1,
        load_best_model_at_end=True,
    )  # fmt: skip
    scripted(session, {0: 0.9, 2: 0.5, 4: 0.4, 6: 0.45})
    kept = []
    for metrics in session.train([heard]):
        if metrics.step == 4:
            kept.append(metrics.step)
        assert metrics.seconds > 0
    assert kept and session.steps_done == 6
    assert [step for step, _ in session.evaluations] == [0, 2, 4, 6]
    assert ("sampled", 0, ["say ab "]) in heard.events
    assert [e[1] for e in heard.events if e[0] == "sampled"] == [0, 4, 6]
    output = tmp_path / "run"
    assert sorted(p.name for p in output.iterdir()) == [".lock", "checkpoints"]
    assert [p.name for p in checkpoints(output)] == ["step-000005"]
    # The best one is in place.
    again = opened(tmp_path, device, "output=" + str(tmp_path / "again"), steps=8)
    for _, batches in zip(range(4), again.stream, strict=False):
        again.step(batches)
    assert (again.parameters() == session.parameters()).all()


def test_train_writes_nothing_unasked(tmp_path: Path, device: Device) -> None:
    session = opened(tmp_path, device, eval_every=4)
    assert len(list(session.train())) == 8
    assert not (tmp_path / "run").exists()
    assert [step for step, _ in session.evaluations] == [4, 8]


def test_the_learning_rate_can_be_set(tmp_path: Path, device: Device) -> None:
    session = opened(tmp_path, device, schedule="linear", steps=8)
    assert session.learning_rate == 0.02
    rates = []
    for metrics in session.steps(pause=lambda: True):
        if metrics is not None:
            rates.append(metrics.learning_rate)
            continue
        if session.steps_done == 3:
            session.learning_rate = 0.5
        if session.steps_done == 5:
            session.learning_rate = None
    linear = [0.02 * (8 - n) / 8 for n in range(8)]
    assert rates == pytest.approx([*linear[:3], 0.5, 0.5, *linear[5:]])
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"session\.learning_rate: got"):
            session.learning_rate = wrong


def test_a_rate_of_zero_trains_nothing(tmp_path: Path, device: Device) -> None:
    session = opened(tmp_path, device)
    before = session.parameters()
    session.learning_rate = 0.0
    list(session.steps())
    assert (session.parameters() == before).all()


def test_a_run_off_the_main_thread(tmp_path: Path, device: Device) -> None:
    done: list[Path] = []
    thread = threading.Thread(
        target=lambda: done.append(run_training(opened(tmp_path, device, eval_every=4)))
    )
    thread.start()
    thread.join()
    assert (done[0] / ADAPTER).exists()


def test_answers_to_prompts(tmp_path: Path, device: Device) -> None:
    prompts = ["say ab ", "say abab "]
    session = opened(tmp_path, device, sample_prompts=prompts, sample_every=4, sample_tokens=3)
    asked: list[tuple[int, int, int]] = []

    class Asked(Listener):
        def sampling(self, step: int, done: int, total: int) -> None:
            asked.append((step, done, total))

    output = run_training(session, listeners=[Asked()])
    assert asked == [(step, done, 2) for step in (0, 4, 8) for done in (0, 1)]
    lines = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in lines] == [
        (step, prompt) for step in (0, 4, 8) for prompt in prompts
    ]
    assert lines[-1]["text"] == session.generate(prompts[1], max_tokens=3)


def test_parts_of_epochs_of_a_stream(tmp_path: Path, device: Device) -> None:
    path = write_run(tmp_path, data={"streaming": True}, train={"steps": 3, "save_every": None})
    session = TrainingSession.from_config(path, ["train.eval_every=0.5 epochs"], device=device)
    with pytest.raises(InputError, match=r"train\.eval_every: 0\.5 epochs: rows that are streamed"):
        list(session.train())
    whole = TrainingSession.from_config(path, ["train.eval_every=1 epoch"], device=device)
    assert len(list(whole.train())) == 3


def test_the_callers_time_is_not_a_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("lora.training.metrics.time.perf_counter", lambda: now[0])
    clock = StepClock()
    step = Metrics(1, 0.1, 1.0, 1.0, 1e-3, 100, 10, 0.0, 0.0)

    def arrives(after: float, number: int = 1) -> list[float]:
        now[0] += after
        return [m.seconds for m in clock.timed([step] * number)]

    assert arrives(2.0) == [2.0]
    now[0] += 50.0  # the caller evaluates, and the device ends two steps meanwhile
    clock.left(50.0)
    assert arrives(0.1, 2) == [2.0, 2.0]
    now[0] += 50.0  # the device had nothing to do meanwhile
    clock.left(50.0)
    assert arrives(5.0) == [pytest.approx(5.0)]
    now[0] += 0.1
    clock.left(0.1)
    assert arrives(2.9) == [pytest.approx(3.0)]


def test_samples_of_a_share(tmp_path: Path) -> None:
    """What data.eval_share takes is not trained, also where little of it is evaluated."""
    path = write_run(tmp_path, n_rows=20)
    given = ["data.eval=null", "data.eval_share=0.3", "train.eval_samples=2"]
    config = load_config(str(path), given)
    workload = Workload.open(config, train=True)
    assert (len(workload.train_examples), len(workload.eval_examples)) == (14, 2)
    held_out = {example.row for example in Workload.open(config, train=False).eval_examples}
    assert len(held_out) == 6
    assert {example.row for example in workload.eval_examples} < held_out
    assert not held_out & {example.row for example in workload.train_examples}
