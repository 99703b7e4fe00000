"""The directory of a run: one process has it, what is the user's stays, and every end saves."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora import InputError, TrainingSession, run_training
from lora.shaders.errors import LoraError
from lora.training import run
from lora.training.checkpoint import checkpoints
from lora.training.listeners import Listener
from lora.training.metrics import Metrics
from lora.training.output import check_output, owned_output
from tests.support.command_server import run_lora
from tests.support.tiny_run import write_run

ADAPTER = "adapter_model.safetensors"


def test_one_process_has_a_directory(tmp_path: Path) -> None:
    output = tmp_path / "run"
    hold = (
        "import sys, time\nfrom pathlib import Path\n"
        "from lora.training.output import owned_output\n"
        f"with owned_output(Path({str(output)!r}), resuming=False):\n"
        "    print('held', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for resuming in (False, True):
            with pytest.raises(InputError, match=f"process {other.pid} on .* writes to"):
                check_output(output, resuming=resuming)
        with pytest.raises(InputError, match="writes to"), owned_output(output, resuming=False):
            raise AssertionError("two have it")
        other.kill()  # the lock goes with it
    with owned_output(output, resuming=False) as mine:
        assert mine == output


def test_files_of_the_user_are_neither_moved_nor_mixed_with(tmp_path: Path) -> None:
    """The data lies in the directory that is to be written."""
    path = write_run(tmp_path)
    with pytest.raises(InputError, match="holds files that no run of ours has left"):
        run_training(TrainingSession.from_config(path, [f"output={tmp_path}"]))
    with pytest.raises(InputError, match="holds no run of ours to go on with"):
        check_output(tmp_path, resuming=True)
    assert not (tmp_path / ".lock").exists()
    assert (tmp_path / "train.jsonl").is_file() and not list(tmp_path.parent.glob("*.old-*"))


def test_an_earlier_run_is_moved_aside_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "run"
    (output / "checkpoints").mkdir(parents=True)
    (output / "checkpoints" / "mine").write_text("kept")
    with caplog.at_level(logging.WARNING), owned_output(output, resuming=False):
        assert [p.name for p in output.iterdir()] == [".lock"]
    assert (tmp_path / "run.old-1" / "checkpoints" / "mine").read_text() == "kept"
    assert f"The run that stood in {output} is now in {output}.old-1." in caplog.messages


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        ("file", "f", "is a file"),
        ("file", "f/x", "is a file, so that"),
        ("nothing", ".", "names no directory of its own"),
        ("nothing", "x" * 300, "cannot be used: File name too long"),
    ],
)
def test_places_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: str, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if make == "file":
        Path("f").write_text("")
    with pytest.raises(InputError, match=message):
        check_output(Path(name), resuming=False)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no /proc")
def test_a_place_that_takes_no_directory(tmp_path: Path) -> None:
    """Rights don't say so to the superuser: it is tried. Where one is taken, nothing is left."""
    with pytest.raises(InputError, match="cannot be used: No such file"):
        check_output(Path("/proc/self/fdinfo/run"), resuming=False)
    check_output(tmp_path / "a" / "b", resuming=False)
    assert not list(tmp_path.iterdir())


def test_dry_run_looks_at_the_directory(tmp_path: Path) -> None:
    """Before the model is loaded, with the status of wrong input."""
    path = write_run(tmp_path)
    (tmp_path / "run").write_text("a file")
    done = run_lora("train", path, "--dry-run")
    assert done.returncode == 2 and "is a file" in done.stderr and len(done.stderr) < 400


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP, and kills at once")
@pytest.mark.parametrize("signum", ["SIGTERM", "SIGHUP"])
def test_signals_that_end_a_run_save_it(tmp_path: Path, signum: str) -> None:
    number = signal.Signals[signum]
    path = write_run(tmp_path, n_rows=40, train={"epochs": 50})
    output = tmp_path / "run with space"
    arguments = [sys.executable, "-m", "lora", "train", str(path), "--set", f"output={output}"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        metrics, end = output / "metrics.jsonl", time.monotonic() + 90
        while not (metrics.exists() and metrics.read_text()):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert len(checkpoints(output)) == 1
    assert f"--set 'output={output}' --resume" in printed.splitlines()[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes that break so")
def test_a_reader_that_is_gone_does_not_end_a_run(tmp_path: Path) -> None:
    """As a closed terminal, or `| head -1`."""
    path = write_run(tmp_path, n_rows=40)
    arguments = [sys.executable, "-m", "lora", "train", str(path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        process.stdout.close()
        process.wait(timeout=60)
    assert (tmp_path / "run" / ADAPTER).is_file()


def test_a_run_that_fails_saves_what_it_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails(Listener):
        def step(self, metrics: Metrics) -> bool:
            if metrics.step == 3:
                raise LoraError("the loss was no longer finite")
            return False

    path = write_run(tmp_path)
    with caplog.at_level(logging.WARNING), pytest.raises(LoraError, match="finite"):
        run_training(TrainingSession.from_config(path), listeners=[Fails()])
    (checkpoint,) = checkpoints(tmp_path / "run")
    assert (checkpoint / ADAPTER).is_file()
    assert any(f"Saved {checkpoint} before giving up" in line for line in caplog.messages)
    run_training(TrainingSession.from_config(path), resuming=True)
    resumed = (tmp_path / "run" / ADAPTER).read_bytes()
    whole = run_training(TrainingSession.from_config(path, [f"output={tmp_path / 'whole'}"]))
    assert (whole / ADAPTER).read_bytes() == resumed


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_for_metrics_does_not_end_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(Listener):
        """Told before the file of metrics is opened: puts it on a disk without room."""

        def started(self, session: TrainingSession) -> None:
            (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")

    audience = run.Audience
    monkeypatch.setattr(run, "Audience", lambda hearers: audience([Full(), *hearers]))
    path = write_run(tmp_path, train={"epochs": 1})
    with caplog.at_level(logging.WARNING):
        output = run_training(TrainingSession.from_config(path))
    assert (output / ADAPTER).is_file()
    assert any("cannot be written (No space left on device)" in line for line in caplog.messages)


def test_home_and_variables_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    path = write_run(tmp_path)
    overrides = ["output=~/x", "model.path=$PLACE/model.gguf", "data.train=[~/train.jsonl]"]
    session = TrainingSession.from_config(path, overrides)
    assert session.config.output == f"{tmp_path}/x"
    session.close()
    with pytest.raises(InputError, match="names the variable .NOWHERE, which is not set"):
        TrainingSession.from_config(path, ["output=$NOWHERE/x"])
