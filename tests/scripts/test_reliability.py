"""The recorder of a run's files: it finds what was not synced; and the soak's own judgement."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lora import TrainingSession, run_training
from lora.storage import files
from lora.training.checkpoint import newest_whole
from lora.training.listeners import Listener
from scripts.reliability.case import Tally
from scripts.reliability.recorder import Moment, Recorder, lay_out
from tests.support.tiny_run import write_run


class Announced(Listener):
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def saved(self, step: int, path: Path) -> None:
        self._recorder.announced = step


def recorded(folder: Path) -> list[Moment]:
    """A run of four steps with a checkpoint after each, of which two are kept."""
    train = {"steps": 4, "save_every": 1, "keep_checkpoints": 2}
    path = write_run(folder, train=train)
    recorder = Recorder(folder / "run")
    with TrainingSession.from_config(path) as session, recorder.recording():
        run_training(session, listeners=[Announced(recorder)])
    return recorder.moments


def steps_left(moments: list[Moment], kind: str, folder: Path) -> list[tuple[int, int]]:
    """At each moment, the step that was announced and the one that the disk would give back."""
    found = []
    for number, moment in enumerate(moments):
        place = folder / f"{kind}{number}"
        lay_out(getattr(moment, kind), place)
        whole = newest_whole(place)
        found.append((moment.announced, 0 if whole is None else int(whole[1]["step"])))
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="directories are not synced there")
def test_power_may_go_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint that was said to be saved is lost; without the syncs of directories it is."""
    (tmp_path / "synced").mkdir()
    moments = recorded(tmp_path / "synced")
    assert len(moments) > 60 and {m.event for m in moments} >= {"sync", "os.rename", "os.mkdir"}
    for kind in ("killed", "least", "names_first"):
        steps = steps_left(moments, kind, tmp_path)
        assert all(left >= announced for announced, left in steps)
        assert max(left for _, left in steps) == 4
    monkeypatch.setattr(files, "sync_directory", lambda path: None)
    (tmp_path / "unsynced").mkdir()
    unsynced = steps_left(recorded(tmp_path / "unsynced"), "least", tmp_path / "unsynced")
    assert any(left < announced for announced, left in unsynced)


def test_a_row_of_the_table() -> None:
    tally = Tally("a fault")
    tally.add("ended well", True)
    tally.add("ended well", False)
    tally.add("WRONG: lost", True)
    assert tally.row() == "| a fault | 3 | 2 × ended well; 1 × WRONG: lost | 2 of 3 |"


def test_the_soak_ends_with_a_table(tmp_path: Path) -> None:
    """Of a run that is over after a moment."""
    command = [sys.executable, "-m", "scripts.reliability.soak", "--minutes", "0.02"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "evaluations" in lines[1] and lines[3].startswith("| step | minutes | host, MiB |")
    assert lines[-1].endswith("flat.")
