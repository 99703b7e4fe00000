"""What other tools read of a run: TensorBoard, Weights & Biases offline, CSV."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora import InputError, Listener, TrainingSession, run_training
from lora.config.schema import load_config
from lora.shaders.device import Device
from lora.training.history import History
from lora.training.metrics import Metrics
from lora.training.reporters import check_reporters, open_reporters
from tests.support.tiny_run import write_run


def run(
    folder: Path, device: Device, *overrides: str, resuming: bool = False, stop_at: int = 0
) -> Path:
    """A run of six steps with evaluations after the third and the last, and a sample."""

    class Stop(Listener):
        def step(self, metrics: Metrics) -> bool:
            return metrics.step == stop_at

    path = folder / "config.yaml"
    if not path.exists():
        write_run(folder, train={"steps": 6, "eval_every": 3, "sample_prompts": ["say ab "],
                                 "sample_tokens": 2})  # fmt: skip
    config = load_config(str(path), list(overrides))
    check_reporters(config)
    with TrainingSession(config, device=device) as session:
        listeners = [*open_reporters(config), Stop()]
        return run_training(session, resuming=resuming, listeners=listeners)


# wandb's log of records is LevelDB's: blocks of 32 KiB, in which each piece of a record has its
# checksum, length and kind (1 whole, 2 first, 3 middle, 4 last) before it.
READER = """
import json, struct, sys
from wandb.proto import wandb_internal_pb2
data, place, record, rows = open(sys.argv[1], "rb").read(), 7, b"", []
while place + 7 <= len(data):
    left = 32768 - place % 32768
    if left < 7:
        place += left
        continue
    _, length, kind = struct.unpack("<IHB", data[place:place + 7])
    record += data[place + 7:place + 7 + length]
    place += 7 + length
    if kind in (1, 4):
        parsed = wandb_internal_pb2.Record()
        parsed.ParseFromString(record)
        record = b""
        if parsed.WhichOneof("record_type") == "history":
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json)
                         for i in parsed.history.item})
print(json.dumps(rows))
"""


def rows_of(output: Path) -> list[dict[str, str]]:
    with open(output / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_csv(tmp_path: Path, device: Device) -> None:
    """Also of a run that was stopped and resumed, with the steps it did twice once."""
    output = run(tmp_path, device, "train.report_to=csv", "train.save_every=2", stop_at=4)
    before = rows_of(output)
    for path in sorted((output / "checkpoints").iterdir())[1:]:
        path.rename(tmp_path / path.name)
    run(tmp_path, device, "train.report_to=csv", "train.save_every=2", resuming=True)
    rows = rows_of(output)
    assert rows[:2] == before[:2]
    steps = [row for row in rows if row["loss"]]
    evals = [row for row in rows if row["eval_loss"]]
    assert [row["step"] for row in steps] == ["1", "2", "3", "4", "5", "6"]
    assert [row["step"] for row in evals] == ["3", "6"]
    history = History.read(output / "metrics.jsonl")
    assert [float(row["loss"]) for row in steps] == [line["loss"] for line in history.steps]
    assert float(evals[1]["eval_accuracy"]) == history.evaluations[1]["eval_accuracy"]


@pytest.mark.filterwarnings("ignore")  # tensorboard's own
def test_tensorboard_reads_it(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a run is resumed within the second it began in: files are named by it."""
    pytest.importorskip("tensorboardX")
    now = SimpleNamespace(time=lambda: 1_700_000_000.5)
    monkeypatch.setattr("tensorboardX.event_file_writer.time", now)
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    setting = ["train.report_to=tensorboard", "train.save_every=2"]
    output = run(tmp_path, device, *setting, stop_at=4)
    for path in sorted((output / "checkpoints").iterdir())[1:]:
        path.rename(tmp_path / path.name)
    run(tmp_path, device, *setting, resuming=True)
    found = accumulators.EventAccumulator(str(output / "tensorboard"))
    found.Reload()
    losses = [(event.step, event.value) for event in found.Scalars("train/loss")]
    history = History.read(output / "metrics.jsonl")
    assert losses == [(line["step"], pytest.approx(line["loss"])) for line in history.steps]
    assert [event.step for event in found.Scalars("eval/loss")] == [3, 6]
    assert {"train/learning_rate", "eval/exact_match"} <= set(found.Tags()["scalars"])
    assert "samples/0/text_summary" in found.Tags()["tensors"]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file of events, by wandb's own messages; in processes, in which wandb leaves threads."""
    pytest.importorskip("wandb")
    path = write_run(tmp_path, train={"steps": 4, "eval_every": 2, "report_to": ["wandb"]})
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"),
                        ("WANDB_PROJECT", "mine")):  # fmt: skip
        monkeypatch.setenv(name, value)
    done = subprocess.run(
        [sys.executable, "-m", "lora", "train", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    output = tmp_path / "run"
    assert (output / "wandb_run_id.txt").read_text().strip()
    (file,) = output.glob("wandb/offline-run-*/run-*.wandb")
    read = subprocess.run([sys.executable, "-c", READER, str(file)], capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    rows: list[dict[str, Any]] = json.loads(read.stdout)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    history = History.read(output / "metrics.jsonl")
    assert losses == pytest.approx([line["loss"] for line in history.steps])
    assert len([row for row in rows if "eval/loss" in row]) == 2


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_reporter_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("lora.training.reporters.find_spec", lambda _: None)
    config = load_config(str(write_run(tmp_path)), [f"train.report_to={name}"])
    with pytest.raises(InputError, match=rf"pip install 'webgpu-lora\[{name}\]', or leave {name}"):
        check_reporters(config)


def test_wandb_without_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the first step; in a process of its own."""
    pytest.importorskip("wandb")
    path = write_run(tmp_path, train={"steps": 1, "report_to": ["wandb"]}, data={"eval": None})
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    done = subprocess.run(
        [sys.executable, "-m", "lora", "train", str(path)],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "train.report_to: wandb cannot begin a run" in done.stderr
    assert not (tmp_path / "run" / "adapter_config.json").exists()
