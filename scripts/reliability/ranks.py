"""Faults of two processes under mpiexec, on whatever device there is (`device: shared`)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lora.training.checkpoint import checkpoints
from scripts.reliability.case import ADAPTER, STEPS, Case, Tally

_SECONDS = 10.0  # within which all must have ended
# What goes wrong in one rank, in the midst of a step; put into the process before the command runs.
_BREAKING = """
import sys
from lora.training.session import TrainingSession
enter = TrainingSession._enter
def breaking(session, *batch, **options):
    enter(session, *batch, **options)
    if session.communicator.rank == {rank} and session.steps_done == {at}:
        {what}
TrainingSession._enter = breaking
from lora.__main__ import main
sys.argv[0] = "lora"
main()
"""
_BREAKS = {
    "exception": (
        "an exception in one of two ranks",
        "raise RuntimeError('a fault of this test')",
        "RuntimeError: a fault of this test",
    ),
    "device": (
        "the device of one of two ranks is destroyed mid-step",
        "session.device.handle.wgpu.destroy()",
        "was lost",
    ),
}


class RanksCase:
    """A run of two ranks whose adapter is known.

    Args:
        case: whose config they take, with half the micro-batches each.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.output = case.folder / "ranks"
        start = time.monotonic()
        with self.started() as process:
            printed, _ = process.communicate()
        self.life = time.monotonic() - start
        if process.returncode:
            raise RuntimeError(printed)
        self.adapter = (self.output / ADAPTER).read_bytes()

    @contextmanager
    def started(self, *options: str, code: str | None = None) -> Iterator[subprocess.Popen[str]]:
        """`mpiexec -n 2 lora train`, in place of which `code` may stand."""
        python = [sys.executable, *(["-m", "lora"] if code is None else ["-c", code])]
        command = [
            str(Path(sys.executable).with_name("mpiexec")), "-n", "2", *python, "train",
            str(self.case.config), "--set", f"output={self.output}", "--set", "device=shared",
            *options,
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process:
            yield process

    def mended(self) -> bool:
        """Whether the run, gone on with by two ranks, ends in the adapter of one without a fault.

        Before its first checkpoint it begins anew.
        """
        options = ["--resume"] if checkpoints(self.output) else []
        with self.started(*options) as process:
            process.communicate()
        same = process.returncode == 0 and (self.output / ADAPTER).read_bytes() == self.adapter
        self.clear()
        return same

    def clear(self) -> None:
        """Removes what runs have left."""
        for path in self.case.folder.glob("ranks*"):
            shutil.rmtree(path, ignore_errors=True)


def rank_kills(case: RanksCase, count: int) -> Tally:
    """SIGKILL of either rank: three of four while it trains, the others in its whole life."""
    tally, rng = Tally("SIGKILL of one of two ranks, at random moments"), np.random.default_rng(0)
    while tally.count < count:
        case.clear()
        rank, while_training = tally.count % 2, tally.count // 2 % 4 != 3
        with case.started() as process:
            if while_training:
                _wait_for_steps(process, case.output)
                time.sleep(float(rng.uniform(0.0, 0.25)) * case.life)
            else:
                time.sleep(float(rng.uniform(0.2, 0.8)) * case.life)
            killed = _process_of(process, rank)
            if killed is None or process.poll() is not None:
                process.communicate()
                continue  # all was done
            began = time.monotonic()
            os.kill(killed, signal.SIGKILL)
            printed, _ = process.communicate()
            seconds = time.monotonic() - began
        tally.add(_judged(printed, f"lora: rank {rank} on ", seconds, case), case.mended())
    return tally


def rank_breaks(case: RanksCase, count: int, kind: str) -> Tally:
    """An exception or a lost device in either rank; `kind` is one of _BREAKS."""
    name, what, cause = _BREAKS[kind]
    tally, rng = Tally(name), np.random.default_rng(1)
    for turn in range(count):
        case.clear()
        rank, at = turn % 2, int(rng.integers(1, STEPS - 1))
        with case.started(code=_BREAKING.format(rank=rank, at=at, what=what)) as process:
            began = time.monotonic()
            printed, _ = process.communicate()
            seconds = time.monotonic() - began - case.life
        right = cause in printed and process.returncode == 1
        result = _judged(printed, f"lora: rank {rank} on ", seconds, case)
        tally.add(result if right else f"WRONG: {printed[-300:]}", case.mended())
    return tally


def rank_signals(case: RanksCase, count: int) -> Tally:
    """Ctrl-C of the launcher."""
    tally, rng = Tally("SIGINT to mpiexec, at random steps"), np.random.default_rng(2)
    while tally.count < count:
        case.clear()
        with case.started() as process:
            _wait_for_steps(process, case.output)
            time.sleep(float(rng.uniform(0.0, 0.1)) * case.life)
            process.send_signal(signal.SIGINT)
            printed, _ = process.communicate()
        if process.returncode == 0:
            continue
        right = "Go on with: mpiexec -n 2 lora train" in printed and checkpoints(case.output)
        result = "a checkpoint, the command to go on with"
        tally.add(result if right else f"WRONG: {printed[-300:]}", case.mended())
    return tally


def _judged(printed: str, named: str, seconds: float, case: RanksCase) -> str:
    saved = "behind a checkpoint" if checkpoints(case.output) else "before the first checkpoint"
    if (case.output / ADAPTER).exists():
        saved = "at its end"
    if seconds > _SECONDS:
        return f"WRONG: ended after {seconds:.0f} s"
    if printed.count("lora: ") != 1 or named not in printed:
        # Who dies before its connection stands is named by the launcher alone.
        early = "lora: " not in printed and not case.output.exists()
        return "ended by mpiexec, before it was watched" if early else f"WRONG: {printed[-400:]}"
    return f"all ended within {_SECONDS:.0f} s, one line named it, {saved}"


def _wait_for_steps(process: subprocess.Popen[str], output: Path) -> None:
    metrics = output / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.002)


def _process_of(launcher: subprocess.Popen[str], rank: int) -> int | None:
    """The process of a rank: a grandchild of mpiexec whose environment says so."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes().split(b"\0")
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue
        ours = f"PMI_RANK={rank}".encode() in environment and b"sentinel" not in command
        if ours and b"lora\0train" in command and _descends(int(path.name), launcher.pid):
            return int(path.name)
    return None


def _descends(process: int, ancestor: int) -> bool:
    while process > 1 and process != ancestor:
        try:
            stat = Path(f"/proc/{process}/stat").read_text()
        except OSError:
            return False
        process = int(stat.rpartition(")")[2].split()[1])
    return process == ancestor
