"""Training sessions over synthetic models, and the device's memory, as the benchmarks need them."""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora.shaders.device import Device
from lora.training.session import TrainingSession
from tests.support.synthetic_models import SHAPES
from tests.support.synthetic_runs import random_sequences

_WARM_SECONDS, _TIMED_SECONDS = 0.5, 1.0
_AHEAD = 4  # steps that have ended before a run of steps is timed: readbacks are three late at most


@dataclass(frozen=True)
class Case:
    """What is timed: micro-batches of `batch_size` sequences of `length` tokens, how often.

    Attributes:
        packed: whether sequences are of an eighth of the length up to all of it.
    """

    batch_size: int
    length: int
    steps: int
    packed: bool = False

    @property
    def warm_up(self) -> int:
        """Steps before those."""
        return max(1, self.steps // 4)

    def __str__(self) -> str:
        return f"{self.batch_size}x{self.length}" + "p" * self.packed

    def data(self, model: str) -> list[np.ndarray]:
        """The sequences of all steps, the same for everyone who asks."""
        n = self.batch_size * (self.warm_up + self.steps)
        sequences = random_sequences(SHAPES[model].vocab_size, n, self.length)
        if self.packed:
            lengths = np.random.default_rng(2).integers(self.length // 8, self.length + 1, n)
            sequences = [ids[:k] for ids, k in zip(sequences, lengths, strict=True)]
        return sequences

    def tokens(self, model: str) -> float:
        """Of a step, on average."""
        timed = self.data(model)[self.batch_size * self.warm_up :]
        return sum(map(len, timed)) / self.steps


def step_times(step: Callable[[int], None], n_batches: int, least: int) -> list[float]:
    """Seconds of steps that are waited for, of the first batch to the last, again and again.

    Half a second of them comes first: a GPU that was idle takes that long to reach its clock.

    Args:
        step: takes a step on the batch of that number, and waits for the device.
        n_batches: that there are.
        least: steps; they take a second at least, too.
    """
    times: list[float] = []
    numbers, begun = itertools.cycle(range(n_batches)), time.perf_counter()
    while time.perf_counter() - begun < _WARM_SECONDS:
        step(next(numbers))
    begun = time.perf_counter()
    while len(times) < least or time.perf_counter() - begun < _TIMED_SECONDS:
        start = time.perf_counter()
        step(next(numbers))
        times.append(time.perf_counter() - start)
    return times


def running_time(session: TrainingSession, batches: Sequence[Any], seconds: float) -> float:
    """Seconds a step, as training takes steps: none is waited for, and results come late.

    Counted between arrivals of results, from when the host is ahead of the device.

    Args:
        session: takes a step on each of these, again and again.
        batches: of a step each.
        seconds: that this takes at least.
    """
    arrivals: list[float] = []
    for batch in itertools.cycle(batches):
        session.step(batch)
        found = session.finished_steps()
        arrivals += [time.perf_counter()] * len(found)
        if len(arrivals) > 2 * _AHEAD and arrivals[-1] - arrivals[_AHEAD] >= seconds:
            break
    session.finished_steps(wait=True)
    return (arrivals[-1] - arrivals[_AHEAD]) / (len(arrivals) - 1 - _AHEAD)


def shake_adapter(session: TrainingSession) -> None:
    """Random numbers in place of B = 0, which would hide half of the gradients."""
    rng = np.random.default_rng(1)
    modules = session.layout.to_modules(session.parameters())
    for path, (a, b) in modules.items():
        modules[path] = (a, rng.normal(0, 0.02, b.shape).astype(np.float32))
    session.device.memory.write(session.adapter.parameters, session.layout.from_modules(modules))


def used_memory() -> int | None:
    """Bytes in use on the first NVIDIA GPU by whoever; None where there is no nvidia-smi."""
    answer = _nvidia_smi("memory.used")
    return None if answer is None else int(answer) << 20


def describe(device: Device) -> str:
    """The GPU, its driver, and what WebGPU comes from."""
    named = _nvidia_smi("name,driver_version")
    if named is None or device.facts.is_cpu:
        return f"{device.facts.name}, {device.facts.info['description']}, {device.facts.software}"
    return f"{named}, {device.facts.software}"


def _nvidia_smi(fields: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A table's lines."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines]
