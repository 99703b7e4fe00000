"""What a checkpoint can be gone on with, and how a finished run is extended."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from lora import InputError, TrainingSession, run_training
from lora.config.schema import load_config
from lora.training import output as output_module
from lora.training.checkpoint import checkpoints
from lora.training.listeners import Listener
from lora.training.metrics import Metrics
from lora.training.resuming import check_can_resume, resume
from tests.support.tiny_gguf import write_tiny_llama
from tests.support.tiny_run import TYPES, write_run

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run of four steps that is at its end."""
    path = write_run(tmp_path_factory.mktemp("finished"), train={"steps": 4})
    run_training(TrainingSession.from_config(path))
    return path


def output_of(config: Path) -> Path:
    return config.parent / "run"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("adapter.alpha=12", r"adapter\.alpha 6\.0, and now it is 12\.0"),
        ("adapter.variant=rslora", r"adapter\.variant lora, and now it is rslora"),
        ("adapter.targets=[q_proj]", r"adapter\.targets down_proj, .*, and now it is q_proj"),
        ("adapter.layers=[1]", r"adapter\.layers 0, 1, 2, and now it is 1"),
        ("train.betas=[0.9, 0.99]", r"train\.betas 0\.9, 0\.999, and now it is 0\.9, 0\.99"),
        ("train.schedule=linear", r"train\.schedule cosine, and now it is linear"),
        ("train.epsilon=1e-6", r"train\.epsilon 1e-08, and now it is 1e-06"),
        ("train.seed=1", r"train\.seed 0, and now it is 1"),
        ("data.train_on=all", "other tokens of the data to train on"),
        ("data.max_length=9", "other data|other tokens of the data"),
        ("train.steps=3", "has 4 steps behind it, and the run as configured has only 3"),
    ],
)
def test_what_cannot_be_right_is_refused(finished: Path, setting: str, said: str) -> None:
    session = TrainingSession.from_config(finished, [setting])
    with session, pytest.raises(InputError, match=said):
        resume(session, output_of(finished))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("adapter.rank=5", r"adapter\.rank 3, and now it is 5"),
        ("train.schedule=linear", r"train\.schedule cosine, and now it is linear"),
        ("data.packing=true", r"data\.packing False, and now it is True"),
    ],
)
def test_settings_are_refused_before_anything_is_loaded(
    finished: Path, setting: str, said: str
) -> None:
    """A model that isn't there is not what is complained of."""
    config = load_config(str(finished), [setting, "model.path=/nowhere/model.gguf"])
    with pytest.raises(InputError, match=rf"step-000004 was made with .*{said}[;.]"):
        check_can_resume(config)
    check_can_resume(load_config(str(finished), ["model.path=/nowhere/model.gguf"]))


def test_data_in_another_order_is_refused(finished: Path, tmp_path: Path) -> None:
    rows = (finished.parent / "train.jsonl").read_text().splitlines(keepends=True)
    for name, lines, said in (
        ("turned", rows[::-1], "the same data in another order"),
        ("fewer", rows[1:], "other data .10 examples, and now there are 9"),
        ("other", [rows[0].replace("say", "tell"), *rows[1:]], "the tokens differ"),
    ):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(lines))
        session = TrainingSession.from_config(finished, [f"data.train={path}"])
        with session, pytest.raises(InputError, match=said):
            resume(session, output_of(finished))


def test_another_base_is_refused(finished: Path, tmp_path: Path) -> None:
    """One with other numbers under the same names; one with another context length."""
    same = tmp_path / "same.gguf"
    shutil.copy(finished.parent / "model.gguf", same)
    session = TrainingSession.from_config(finished, [f"model.path={same}"])
    with session:
        resume(session, output_of(finished))  # another name is no other base
    data = bytearray(same.read_bytes())
    data[-40:] = bytes(40)
    same.write_bytes(data)
    session = TrainingSession.from_config(finished, [f"model.path={same}"])
    with session, pytest.raises(InputError, match="its tensors hold other numbers"):
        resume(session, output_of(finished))
    write_tiny_llama(same, n_layers=3, types=TYPES | {"weight": "Q8_0"})
    session = TrainingSession.from_config(finished, [f"model.path={same}"])
    with session, pytest.raises(InputError, match="its tensors have other names, shapes or types"):
        resume(session, output_of(finished))


def test_a_finished_run_goes_on_with_more_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And with another rate; both are said. With a constant rate it is one run's bytes."""
    train = {"steps": 4, "schedule": "constant"}
    path = write_run(tmp_path, train=train)
    longer = ["train.steps=7", f"output={tmp_path / 'whole'}"]
    whole = run_training(TrainingSession.from_config(path, longer))
    output = run_training(TrainingSession.from_config(path))
    assert [p.name for p in checkpoints(output)] == ["step-000004"]
    with caplog.at_level(logging.WARNING):
        run_training(TrainingSession.from_config(path, ["train.steps=7"]), resuming=True)
    assert any(
        "made with steps 4, and now it is 7: the run goes on so" in m for m in caplog.messages
    )
    assert (output / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 8))
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 7]
    changed = ["train.steps=8", "train.learning_rate=0.01", "train.max_grad_norm=null"]
    with caplog.at_level(logging.WARNING):
        run_training(TrainingSession.from_config(path, changed), resuming=True)
    assert any(
        "train.learning_rate 0.02, and now it is 0.01; with train.max_grad_norm 1.0, and now" in m
        for m in caplog.messages
    )
    assert [p.name[-1] for p in checkpoints(output)] == ["4", "7", "8"]


def test_a_checkpoint_after_so_much_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a step takes four minutes; the default is ten."""
    now = [0.0]
    monkeypatch.setattr("lora.training.run.time.monotonic", lambda: now[0])

    class Slow(Listener):
        def step(self, metrics: Metrics) -> bool:
            now[0] = 240.0 * metrics.step
            return False

        def saved(self, step: int, path: Path) -> None:
            saved.append(step)

    saved: list[int] = []
    session = TrainingSession.from_config(write_run(tmp_path))
    step = session.step

    def slow_step(batches) -> None:  # each result is there before the next step begins
        step(batches)
        now[0] = 240.0 * session.steps_done

    session.step = slow_step  # type: ignore[method-assign]
    run_training(session, listeners=[Slow()])
    assert saved == [3, 6, 8, 8]  # at 12 and 24 minutes, at the end, and the adapter


def test_a_disk_without_room_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from lora.commands.cli import app

    path = write_run(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output_module.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    monkeypatch.setattr(TrainingSession, "__init__", lambda *_, **__: pytest.fail("it is loaded"))
    for arguments in (["--dry-run"], []):
        done = CliRunner().invoke(app, ["train", str(path), *arguments])
        assert isinstance(done.exception, InputError)
        assert "MiB for 3 checkpoints and the adapter, and the disk has 1 MiB" in str(
            done.exception
        )
