"""Faults of real processes: kills, signals, two runs in one directory."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np

from lora.training.checkpoint import checkpoints
from scripts.reliability.case import ADAPTER, Case, Tally


def kills(case: Case, count: int) -> Tally:
    """SIGKILL at random moments: three of four while it trains, the others in its whole life."""
    tally, rng = Tally("SIGKILL of the process, at random moments"), np.random.default_rng(0)
    output = case.folder / "killed"
    start = time.monotonic()
    case.command(output).communicate()
    life = time.monotonic() - start
    for turn in range(count):
        shutil.rmtree(output, ignore_errors=True)
        with case.command(output) as process:
            if turn % 4:
                _wait_for_steps(process, output)
                time.sleep(float(rng.uniform(0.0, 0.5)) * life)
            else:
                time.sleep(float(rng.uniform(0.3, 1.0)) * life)
            process.kill()
            process.communicate()
        n_saved = len(checkpoints(output))
        found = "before the first checkpoint" if not n_saved else "behind a checkpoint"
        if (output / ADAPTER).exists():
            found = "at its end"
        tally.add(f"killed {found}", case.is_mended(output))
    return tally


def _wait_for_steps(process: subprocess.Popen[str], output: Path) -> None:
    """Until the first step of a run is done."""
    metrics = output / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.002)


def signals(case: Case, name: str, count: int) -> Tally:
    """A signal at random moments between the first step and the last."""
    number = signal.Signals[name]
    tally, rng = Tally(f"{name} to the process, at random steps"), np.random.default_rng(number)
    output = case.folder / name.lower()
    while tally.count < count:
        shutil.rmtree(output, ignore_errors=True)
        with case.command(output) as process:
            _wait_for_steps(process, output)
            time.sleep(float(rng.uniform(0.0, 0.8)))
            process.send_signal(number)
            printed, _ = process.communicate()
        if process.returncode == 0:
            continue  # it came when all was done
        said = "Go on with: lora train" in printed
        right = process.returncode == 128 + number and said and checkpoints(output)
        result = f"exit status {process.returncode}, a checkpoint, the command to go on with"
        tally.add(
            result if right else f"WRONG: status {process.returncode}", case.is_mended(output)
        )
    return tally


def two_runs(case: Case, count: int) -> Tally:
    """A second run in the directory of one that is under way, new or resuming."""
    tally = Tally("a second run in the same directory")
    output = case.folder / "shared"
    for turn in range(count):
        shutil.rmtree(output, ignore_errors=True)
        with case.command(output) as first:
            while first.poll() is None and not (output / "metrics.jsonl").exists():
                time.sleep(0.002)
            with case.command(output, *(["--resume"] if turn % 2 else [])) as second:
                _, refused = second.communicate()
            first.communicate()
        if first.returncode == 0 and second.returncode == 0:
            continue  # the first was done before the second had started
        named = second.returncode == 2 and f"process {first.pid} on" in refused
        result = "exit status 2 with the first's process" if named else f"WRONG: {refused[-200:]}"
        tally.add(result, (output / ADAPTER).read_bytes() == case.adapter)
    return tally
