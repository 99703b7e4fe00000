"""Faults of the disk: crashes before every event, power loss, no room, no right to write."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from lora.shaders.errors import InputError, LoraError
from lora.training.checkpoint import checkpoints, newest_whole
from lora.training.listeners import Listener
from lora.training.metrics import Metrics
from lora.training.output import check_output
from lora.training.run import run_training
from scripts.reliability.case import ADAPTER, Case, Tally
from scripts.reliability.recorder import Image, Recorder, lay_out


class _Announced(Listener):
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def saved(self, step: int, path: Path) -> None:
        self._recorder.announced = step


def crashes(case: Case) -> list[Tally]:
    """A short run, recorded; what a kill or a power cut leaves at each event is gone on with."""
    output = case.folder / "recorded"
    recorder = Recorder(output)
    with case.session(output) as session, recorder.recording():
        run_training(session, listeners=[_Announced(recorder)])
    shutil.rmtree(output)
    moments = recorder.moments
    tallies = []
    for fault, images in (
        ("process killed before each file-system event", [(m.killed, 0) for m in moments]),
        ("power lost before each: nothing but what was synced",
         [(m.least, m.announced) for m in moments]),
        ("power lost before each: names written, bytes as synced",
         [(m.names_first, m.announced) for m in moments]),
    ):  # fmt: skip
        tallies.append(_tried(case, fault, images))
    return tallies


def _tried(case: Case, fault: str, images: Iterable[tuple[Image, int]]) -> Tally:
    """Goes on from each; equal ones once."""
    tally, output = Tally(fault), case.folder / "image"
    known: dict[Image, tuple[int, bool]] = {}
    for image, announced in images:
        if image not in known:
            shutil.rmtree(output, ignore_errors=True)
            lay_out(image, output)
            found = newest_whole(output)
            step = 0 if found is None else int(found[1]["step"])
            known[image] = step, case.is_mended(output)
        step, same = known[image]
        lost = "no announced checkpoint lost" if step >= announced else "WRONG: a checkpoint lost"
        tally.add(lost, same)
    tally.fault += f" ({len(known)} different states)"
    return tally


class _Fills(Listener):
    """Leaves the disk so many bytes after a step."""

    def __init__(self, ballast: Path, step: int, left: int) -> None:
        self._ballast, self._step, self._left = ballast, step, left

    def step(self, metrics: Metrics) -> bool:
        if metrics.step == self._step:
            free = shutil.disk_usage(self._ballast.parent).free
            with open(self._ballast, "wb") as file:
                file.write(bytes(max(0, free - self._left)))
        return False


def full_disk(case: Case, count: int) -> Tally | None:
    """A disk that fills up at different steps, to different bytes; None without rights to mount."""
    disk = case.folder / "disk"
    disk.mkdir(exist_ok=True)
    size = 64 << 20
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        return None
    tally, ballast, output = Tally("the disk fills up during the run"), disk / "ballast", disk / "o"
    try:
        for turn in range(count):
            shutil.rmtree(output, ignore_errors=True)
            listener = _Fills(ballast, 1 + turn % 10, 4096 * (turn * 7 % count))
            try:
                case.run(output, listener=listener)
                result = "the run went on to its end"
            except LoraError as error:
                said = "cannot be written any more: No space left" in str(error)
                result = "it ended with that said" if said else f"WRONG: {error}"
            except OSError as error:
                result = f"WRONG: {error}"
            ballast.unlink(missing_ok=True)
            tally.add(result, case.is_mended(output))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return tally


class _Removes(Listener):
    """Takes the whole directory away after a step."""

    def __init__(self, output: Path, step: int) -> None:
        self._output, self._step = output, step

    def step(self, metrics: Metrics) -> bool:
        if metrics.step == self._step:
            shutil.rmtree(self._output)
        return False


def no_place(case: Case) -> Tally:
    """Outputs that are no place for a run, before anything is loaded."""
    tally = Tally("outputs that are files, below files, read-only, nameless, over-long")
    tally.same_what = " (the user's files untouched)"
    folder = case.folder / "places"
    folder.mkdir()
    (folder / "file").write_text("mine")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "mine.txt").write_text("mine")
    mine = [folder / "file", folder / "file" / "x", folder / "foreign"]
    for output in (*mine, folder / ("x" * 300), Path("/"), Path("/sys/x")):
        try:
            check_output(output, resuming=False)
            case.run(output)
            result = "WRONG: it was taken"
        except InputError as error:
            result = "exit status 2, one sentence" if len(str(error)) < 600 else f"WRONG: {error}"
        tally.add(result, (folder / "file").read_text() == "mine")
    return tally


def directory_removed(case: Case, count: int) -> Tally:
    """The directory is removed while the run goes on."""
    tally, output = Tally("the directory is removed during the run"), case.folder / "removed"
    for turn in range(count):
        shutil.rmtree(output, ignore_errors=True)
        case.run(output, listener=_Removes(output, 2 + turn))
        kept = bool(checkpoints(output)) and os.path.exists(output / ADAPTER)
        result = "made again: checkpoints and the adapter are there" if kept else "WRONG: lost"
        tally.add(result, (output / ADAPTER).read_bytes() == case.adapter)
    return tally
