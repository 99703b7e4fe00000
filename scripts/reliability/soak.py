"""A tiny model trained for long, with evaluations, checkpoints and generations: memory stays flat.

    python -m scripts.reliability.soak                # 20,000 steps
    python -m scripts.reliability.soak --minutes 10   # so long, on a GPU, say

Prints one table at its end; exit status 1 where memory grew. Needs no package beside the project's
own; the device is the config's `auto` (LORA_WEBGPU, VK_DRIVER_FILES as for any command).
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from lora.config.schema import load_config
from lora.training.listeners import Listener
from lora.training.metrics import EvalResult, Metrics
from lora.training.run import run_training
from lora.training.session import TrainingSession
from scripts.reliability.case import quiet
from tests.support.tiny_run import write_run

EVAL_EVERY, SAVE_EVERY = 100, 250  # steps; a generation follows each evaluation
ROWS = 10  # of the table
GROWTH = 16.0  # MiB that a process may grow by after a tenth of the run: arenas of malloc settle


@dataclass
class Sample:
    """What is taken at one moment: MiB, and counts of the operating system's things."""

    step: int
    minutes: float
    host: float
    device: float
    driver: float | None
    descriptors: int
    mappings: int

    def row(self) -> str:
        """Of the table."""
        driver = "" if self.driver is None else f"{self.driver:.0f}"
        return (
            f"| {self.step:,} | {self.minutes:.1f} | {self.host:.1f} | {self.device:.2f} "
            f"| {driver} | {self.descriptors} | {self.mappings} |"
        )


def host_mib() -> float:
    """Of this process, resident."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20
    except OSError:  # no Linux: the most that there was, in KiB or bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


def driver_mib() -> float | None:
    """Of the whole GPU as its driver counts it; None where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(asked, capture_output=True, text=True)
    try:
        return float(done.stdout.split()[0])
    except (IndexError, ValueError):
        return None


def count_of(path: str) -> int:
    """Entries or lines of something below /proc/self; 0 where there is none."""
    place = Path("/proc/self") / path
    try:
        if place.is_dir():
            return len(os.listdir(place))
        return len(place.read_text().splitlines())
    except OSError:
        return 0


class Watcher(Listener):
    """Generates after each evaluation, takes samples, and stops when the time is over.

    Args:
        session: that is trained.
        steps: of the whole run.
        minutes: after which it ends; None for all steps.
    """

    def __init__(self, session: TrainingSession, steps: int, minutes: float | None) -> None:
        self._session, self._steps, self._minutes = session, steps, minutes
        self.begun = time.monotonic()
        self.samples: list[Sample] = []
        self.n_evals = self.n_saves = self.n_generations = 0
        self.steps_done = 0

    def _share(self, step: int) -> float:
        """Of the run that is done."""
        minutes = (time.monotonic() - self.begun) / 60
        return step / self._steps if self._minutes is None else minutes / self._minutes

    def step(self, metrics: Metrics) -> bool:
        """Counts it; asks for the end when the time is over."""
        self.steps_done = metrics.step
        return self._minutes is not None and self._share(metrics.step) >= 1.0

    def evaluated(self, step: int, result: EvalResult) -> bool:
        """Generates with the adapter as it is, and looks where a row of the table is due."""
        self.n_evals += 1
        self._session.generate(f"say {'ab' * (1 + self.n_evals % 4)} ", max_tokens=8)
        self.n_generations += 1
        if self._share(step) >= len(self.samples) / ROWS:
            self.sample(step)
        return False

    def saved(self, step: int, path: Path) -> None:
        """Counts it."""
        self.n_saves += 1

    def sample(self, step: int) -> None:
        """Takes one."""
        self.samples.append(
            Sample(
                step,
                (time.monotonic() - self.begun) / 60,
                host_mib(),
                sum(self._session.device.allocated.values()) / 2**20,
                driver_mib(),
                count_of("fd"),
                count_of("maps"),
            )
        )


def main() -> None:
    """Runs it and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=None)
    given = parser.parse_args()
    steps = given.steps if given.minutes is None else 100_000_000
    quiet()
    with tempfile.TemporaryDirectory() as name:
        train = {
            "steps": steps, "schedule": "constant", "learning_rate": 1e-4,
            "eval_every": EVAL_EVERY, "save_every": SAVE_EVERY, "keep_checkpoints": 2,
        }  # fmt: skip
        path = write_run(Path(name), n_rows=30, train=train)
        with TrainingSession(load_config(str(path))) as session:
            facts = session.device.facts
            watcher = Watcher(session, steps, given.minutes)
            run_training(session, listeners=[watcher])
            watcher.sample(watcher.steps_done)
    _print(watcher, f"{facts.name}, through {facts.software}")


def _print(watcher: Watcher, device: str) -> None:
    samples = watcher.samples
    print(f"{device}; Python {sys.version.split()[0]}")
    print(
        f"{watcher.steps_done:,} steps, {watcher.n_evals} evaluations, {watcher.n_saves} saves, "
        f"{watcher.n_generations} generations in {samples[-1].minutes:.1f} minutes\n"
    )
    print("| step | minutes | host, MiB | device, MiB (ours) | GPU, MiB (driver) | files | maps |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(sample.row() for sample in samples))
    settled, middle = samples[min(2, len(samples) - 1)], samples[len(samples) // 2]
    last = samples[-1]
    growth = last.host - settled.host
    flat = (
        growth <= GROWTH
        and last.device <= settled.device
        and last.descriptors <= middle.descriptors + 2  # a driver opens some as it needs them
        and (settled.driver is None or last.driver is None or last.driver <= settled.driver + 32)
    )
    print(
        f"\nFrom step {settled.step:,} on: host {growth:+.1f} MiB, device "
        f"{last.device - settled.device:+.2f} MiB; from step {middle.step:,} on files "
        f"{last.descriptors - middle.descriptors:+d}: {'flat' if flat else 'GREW'}."
    )
    sys.exit(0 if flat else 1)


if __name__ == "__main__":
    main()
