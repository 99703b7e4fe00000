"""The files of a run: metrics, checkpoints, resume byte for byte, SIGKILL and Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest

from lora import InputError, TrainingSession, run_training
from lora.config.schema import load_config
from lora.training.checkpoint import checkpoints, started_at
from tests.support.command_server import run_lora
from tests.support.tiny_run import write_run

ADAPTER = "adapter_model.safetensors"


# The command with the kernels of this file's other runs, one of which goes on where it was killed.
_LORA = """
from lora.__main__ import main
from tests.support.short_kernels import short_kernels
with short_kernels():
    main()
"""


@contextmanager
def lora(*arguments: str) -> Iterator[subprocess.Popen]:
    """The command, under way; however the block is left, it is gone and its pipes are closed."""
    with subprocess.Popen(
        [sys.executable, "-c", _LORA, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(*arguments: str) -> None:
    """Runs the command to its end, which must be a good one."""
    done = run_lora(*arguments)
    assert done.returncode == 0, done


def wait_for(condition, process: subprocess.Popen, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.01)


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_files_of_a_run(tmp_path: Path) -> None:
    path = write_run(tmp_path, train={"save_every": 2, "eval_every": 4, "keep_checkpoints": 2})
    output = run_training(TrainingSession.from_config(path))
    lines = metrics_of(output)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert set(steps[0]) == {
        "step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "trained_tokens",
        "tokens_per_second", "seconds",
    }  # fmt: skip
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 8]
    assert [p.name for p in checkpoints(output)] == ["step-000006", "step-000008"]
    last = checkpoints(output)[-1] / ADAPTER
    assert (output / ADAPTER).read_bytes() == last.read_bytes()
    assert not [p for p in tmp_path.rglob("*.tmp")]
    # What ran stands beside what was asked for.
    ran = json.loads((output / "run.json").read_text())
    assert "webgpu: auto" in (output / "config.yaml").read_text()
    assert ran["webgpu"] == os.environ["LORA_WEBGPU"]
    assert set(ran) == {
        "versions", "webgpu", "adapter", "backend", "driver", "features", "matrix_shapes",
        "precision",
    }  # fmt: skip
    assert ran["precision"]["asked"] == "auto"
    package, maker = {"wgpu": ("wgpu", "wgpu-native"), "dawn": ("wgpudawn", "Dawn")}[ran["webgpu"]]
    assert {"webgpu-lora", package, maker, "numpy", "python"} <= set(ran["versions"])
    # The config as resolved runs again as it is; the first run is set aside, not mixed.
    again = run_training(TrainingSession.from_config(output / "config.yaml"))
    assert (again / ADAPTER).read_bytes() == (tmp_path / "run.old-1" / ADAPTER).read_bytes()


@pytest.mark.parametrize("layers", ["all", "{last: 1}"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, layers: str) -> None:
    """SIGKILL between two steps; byte for byte. With a frozen prefix, its cache is lost too."""
    path = write_run(tmp_path, n_rows=40, train={"save_every": 3, "epochs": 2})
    common = [str(path), "--set", f"adapter.layers={layers}"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish("train", *common, "--set", f"output={whole}")
    with lora("train", *common, "--set", f"output={killed}") as process:
        wait_for(lambda: len(checkpoints(killed)) >= 2, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed / ADAPTER).exists()
    finish("train", *common, "--set", f"output={killed}", "--resume")
    assert (killed / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    keys = ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens")
    first, second = ([[m.get(k) for k in keys] for m in metrics_of(f)] for f in (whole, killed))
    assert first == second


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_resume(tmp_path: Path) -> None:
    path = write_run(tmp_path, n_rows=40, train={"epochs": 50})
    output = tmp_path / "run"
    with lora("train", str(path)) as process:
        wait_for(lambda: (output / "metrics.jsonl").exists() and metrics_of(output), process)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in printed
    (checkpoint,) = checkpoints(output)
    assert metrics_of(output)[-1]["step"] == int(checkpoint.name[-6:])


def test_a_run_of_one_step_trains(tmp_path: Path) -> None:
    """With the default warm-up, which is then that one step."""
    path = write_run(tmp_path, train={"steps": 1, "warmup_ratio": 0.03})
    session = TrainingSession.from_config(path)
    (metrics,) = session.train()
    assert metrics.learning_rate == 0.02
    assert session.parameters()[session.workload.initial == 0].any()  # B begins as zeros
    with pytest.raises(InputError, match="got 2, but the run has 1 step: train.learning_rate"):
        TrainingSession.from_config(path, ["train.warmup_ratio=null", "train.warmup_steps=2"])


def test_resume_without_a_checkpoint(tmp_path: Path) -> None:
    session = TrainingSession.from_config(write_run(tmp_path))
    with pytest.raises(InputError, match="holds no checkpoint; run without --resume"):
        run_training(session, resuming=True)


def test_resume_with_another_adapter_or_other_data(tmp_path: Path) -> None:
    path = write_run(tmp_path, train={"save_every": 2})
    run_training(TrainingSession.from_config(path))
    with pytest.raises(InputError, match="made with adapter.rank 3, and now it is 4"):
        run_training(TrainingSession.from_config(path, ["adapter.rank=4"]), resuming=True)
    with pytest.raises(InputError, match="batch_size 3, and now it is 2"):
        run_training(TrainingSession.from_config(path, ["train.batch_size=2"]), resuming=True)


def test_a_resumed_run_sees_the_date_of_its_first_start(tmp_path: Path) -> None:
    """Templates may write it (Llama 3), and the text of a run does not change overnight."""
    template = (
        "{{ strftime_now('%d %b %Y') }} {% for m in messages %}"
        "{{ m.role + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    data = {"chat_template": template, "eval": None}
    path = write_run(tmp_path, data=data, train={"epochs": 1, "save_every": 1})
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    then = datetime(2020, 2, 3, 4, 5)
    first = TrainingSession(load_config(str(path)), started=then)
    tokenizer = first.tokenizer
    assert tokenizer.decode(first.workload.train_examples[0].ids.tolist()).startswith("03 Feb 2020")
    output = run_training(first)
    assert started_at(output) == then
    assert (output / "chat_template.jinja").read_text() == template  # for who runs the adapter
    # One that was opened with another date is refused, and the command opens it with that of then.
    with pytest.raises(InputError, match="writes the date, and this session was opened with anoth"):
        run_training(TrainingSession.from_config(path, ["train.epochs=2"]), resuming=True)
    finish("train", str(path), "--set", "train.epochs=2", "--resume")
    assert len(checkpoints(output)) == 2 and started_at(output) == then


@pytest.mark.parametrize("file", ["state.json", "optimizer.safetensors", ADAPTER])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    """One bit is enough; what is left of it is kept under another name."""
    path = write_run(tmp_path, train={"save_every": 4})
    output = run_training(TrainingSession.from_config(path))
    whole = (output / ADAPTER).read_bytes()
    damaged = checkpoints(output)[-1]
    data = bytearray((damaged / file).read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / file).write_bytes(data)
    with caplog.at_level("WARNING"):
        run_training(TrainingSession.from_config(path), resuming=True)
    assert any(
        f"{damaged} is damaged ({file}" in line
        and "goes on from the one before, step-000004" in line
        for line in caplog.messages
    )
    assert (output / ADAPTER).read_bytes() == whole
    assert (damaged.parent / f"damaged-1-{damaged.name}" / file).read_bytes() == data
    for checkpoint in checkpoints(output):
        (checkpoint / "state.json").write_text("{")
    with pytest.raises(InputError, match="none of 2: not a checkpoint that can be read"):
        run_training(TrainingSession.from_config(path), resuming=True)


def test_a_disk_that_refuses_leaves_no_half_file(tmp_path: Path, monkeypatch) -> None:
    session = TrainingSession.from_config(write_run(tmp_path))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        session.save(tmp_path / "saved")
    assert list((tmp_path / "saved").iterdir()) == []
