"""What the kernels' tests share: activations of which not all rows are in use, and derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from lora.checks.tensors import MARKER, activation, extent_in_use, marked
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

__all__ = [
    "MARKER",
    "activation",
    "central_difference",
    "extent_in_use",
    "marked",
    "run_twice",
    "with_facts",
]


def with_facts(recording: Recording, **facts: Any) -> Recording:
    """As a device would record of which these facts hold, on whatever device there is."""
    return replace(recording, facts=replace(recording.facts, **facts))


def run_twice(program: Program, output: Tensor, before: np.ndarray | None = None) -> np.ndarray:
    """The output after a run; checks that a second run from the same start gives the same bytes."""
    recording = program.recording
    start = recording.memory.read(output) if before is None else before
    results = []
    for _ in range(2):
        recording.memory.write(output, start)
        program.run()
        results.append(recording.memory.read(output))
    assert results[0].tobytes() == results[1].tobytes()
    return results[0]


def central_difference(
    f: Callable[[np.ndarray], float], x: np.ndarray, direction: np.ndarray, step: float = 1e-5
) -> float:
    """The derivative of a float64 function along a direction."""
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)
