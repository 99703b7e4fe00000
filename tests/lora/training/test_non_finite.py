"""Steps that are no numbers: skipped, counted, ended after three in a row, and traced."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from lora import TrainingSession, run_training
from lora.commands.cli import app
from lora.shaders.choice import say_once
from lora.shaders.device import Device
from lora.shaders.errors import LoraError
from lora.training import session as session_module
from lora.training.checkpoint import checkpoints
from lora.training.endings import NotFiniteError
from lora.training.metrics import EvalResult
from lora.training.under_way import Step, StepsUnderWay
from tests.support.half_tensors import needs_halves
from tests.support.tiny_run import write_run

ADAPTER = "adapter_model.safetensors"
Spoil = Callable[[dict[int, float]], None]


@pytest.fixture(autouse=True)
def nothing_was_said() -> None:
    """A line is said once in a process."""
    say_once.cache_clear()


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """Multiplies what each token counts in some steps, in each of their tries: by NaN, or by 0."""
    words, submit = session_module.loss_weight_words, StepsUnderWay._submit

    def put(factors: dict[int, float]) -> None:
        factor = np.ones(4, np.float32)

        def submitted(steps: StepsUnderWay, step: Step) -> None:
            factor[0] = factors.get(step.number, 1.0)
            submit(steps, step)

        def changed(n_trained: int, loss_scale: float = 1.0, *, again: bool = False) -> np.ndarray:
            weight = words(n_trained, loss_scale, again=again).view(np.float32)
            return (weight * factor).view(np.uint32)

        monkeypatch.setattr(StepsUnderWay, "_submit", submitted)
        monkeypatch.setattr(session_module, "loss_weight_words", changed)

    return put


def lines_of(output: Path) -> list[dict[str, object]]:
    """What stands in the file of metrics, as strict JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = (output / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_a_skipped_step_is_counted_and_the_run_goes_on(
    tmp_path: Path, device: Device, spoil: Spoil, caplog: pytest.LogCaptureFixture, precision: str
) -> None:
    """A resumed run has the same loss scale, so the same bytes."""
    if precision == "f16":
        needs_halves(device.facts)
    path = write_run(tmp_path, train={"precision": precision, "save_every": 1, "epochs": 2})
    spoil({2: float("nan"), 3: float("nan")})
    with caplog.at_level(logging.WARNING):
        output = run_training(TrainingSession.from_config(path))
    assert sum("the adapter stays as it was" in line for line in caplog.messages) == 1
    lines = [line for line in lines_of(output) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in lines if line.get("skipped")] == [2, 3]
    tries = 5 if precision == "f16" else 0  # with a smaller scale each time, down to the least
    assert [line.get("retried", 0) for line in lines] == [0, tries, tries, 0, 0, 0, 0, 0]
    assert lines[1]["grad_norm"] is None and lines[3]["grad_norm"] is not None
    states = [json.loads((p / "state.json").read_text()) for p in checkpoints(output)]
    scale = 1024.0 if precision == "f16" else 1.0  # no scale helped, so it is as it was
    assert states[-1]["guard"] == {"scale": scale, "good_steps": 5, "skipped": 2}

    before, after = (checkpoints(output)[i] / ADAPTER for i in (-2, -1))
    whole = (output / ADAPTER).read_bytes()
    assert before.read_bytes() != after.read_bytes() == whole
    shutil.rmtree(after.parent)
    spoil({})
    run_training(TrainingSession.from_config(path), resuming=True)
    assert (output / ADAPTER).read_bytes() == whole


@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_three_in_a_row_end_the_run_with_what_was_good(
    tmp_path: Path, device: Device, spoil: Spoil, caplog: pytest.LogCaptureFixture, precision: str
) -> None:
    """Nothing of the steps behind them counts; the checkpoint is that of the last good step."""
    if precision == "f16":
        needs_halves(device.facts)
    path = write_run(tmp_path, train={"precision": precision})
    whole = run_training(TrainingSession.from_config(path, [f"output={tmp_path / 'whole'}"]))
    session = TrainingSession.from_config(path)
    spoil({3: float("nan"), 4: float("nan"), 5: float("nan")})
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(NotFiniteError, match="Steps 3 to 5: .*Step 3, run again, had finite"),
    ):
        run_training(session)
    (checkpoint,) = checkpoints(tmp_path / "run")
    assert checkpoint.name == "step-000002"
    assert any(f"Saved {checkpoint} before giving up" in line for line in caplog.messages)
    spoil({})
    output = run_training(TrainingSession.from_config(path), resuming=True)
    assert (output / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert [line["step"] for line in lines_of(output) if "loss" in line] == list(range(1, 9))


@pytest.mark.parametrize("rate", ["1e30", "3e38"])
def test_no_rate_makes_the_adapter_overflow(
    tmp_path: Path, rate: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_run(tmp_path)
    session = TrainingSession.from_config(path, [f"train.learning_rate={rate}"])
    with caplog.at_level(logging.WARNING), pytest.raises(LoraError, match="Lower train.learning"):
        run_training(session)
    assert np.isfinite(session.parameters()).all()
    assert checkpoints(tmp_path / "run")
    assert any("it grows without bound" in line for line in caplog.messages)


def test_a_gradient_of_zero_is_said(
    tmp_path: Path, spoil: Spoil, caplog: pytest.LogCaptureFixture
) -> None:
    session = TrainingSession.from_config(write_run(tmp_path))
    spoil(dict.fromkeys(range(1, 9), 0.0))
    with caplog.at_level(logging.WARNING):
        assert len(list(session.train())) == 8
    assert sum("the gradient is exactly 0" in line for line in caplog.messages) == 1


def test_an_adapter_that_is_no_numbers_is_not_saved(tmp_path: Path) -> None:
    session = TrainingSession.from_config(write_run(tmp_path))
    flat = session.parameters()
    flat[:2] = np.nan
    session.memory.write(session.adapter.parameters, flat)
    with pytest.raises(LoraError, match="holds 2 of .* no finite numbers, and is not saved"):
        session.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_an_eval_loss_that_is_none_is_null(tmp_path: Path) -> None:
    path = write_run(tmp_path, train={"eval_every": 4})
    session = TrainingSession.from_config(path)
    nan = float("nan")
    session.evaluate = lambda **_: EvalResult(nan, nan, 0.0, 0.0, 0, 3, 9, 0)  # type: ignore
    output = run_training(session)
    evaluated = [line for line in lines_of(output) if "eval_loss" in line]
    assert [line["eval_loss"] for line in evaluated] == [None, None]


def test_debug_nan_names_what_it_finds(tmp_path: Path) -> None:
    """An infinite number in the adapter of the second layer's down product, and none at all."""
    path = write_run(tmp_path)
    fine = CliRunner().invoke(app, ["debug-nan", str(path), "--steps", "2"])
    assert fine.exit_code == 0, fine.output
    assert "2 steps, and all that they wrote was finite." in fine.output
    assert not (tmp_path / "run").exists()

    session = TrainingSession.from_config(path)
    modules = session.layout.to_modules(session.parameters())
    a, _ = modules["model.layers.1.mlp.down_proj"]
    a[0, 0] = 1e38
    b = modules["model.layers.1.mlp.down_proj"][1]
    b[:] = 1e38
    session.memory.write(session.adapter.parameters, session.layout.from_modules(modules))
    session.save(tmp_path / "broken")
    found = CliRunner().invoke(
        app, ["debug-nan", str(path), "--set", f"adapter.init_from={tmp_path / 'broken'}"]
    )
    assert found.exit_code == 1, found.output
    assert "It begins in layers.1." in found.output and "down" in found.output
