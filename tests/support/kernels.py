"""What the kernels' tests share: activations of which not all rows are in use, and derivatives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lora.checks.tensors import MARKER, activation, extent_in_use, marked
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor

__all__ = [
    "MARKER",
    "activation",
    "central_difference",
    "extent_in_use",
    "marked",
    "run_twice",
]


def run_twice(program: Program, output: Tensor, before: np.ndarray | None = None) -> np.ndarray:
    """The output after a run; checks that a second run from the same start gives the same bytes."""
    device = program.device
    start = device.read(output) if before is None else before
    results = []
    for _ in range(2):
        device.write(output, start)
        program.run()
        results.append(device.read(output))
    assert results[0].tobytes() == results[1].tobytes()
    return results[0]


def central_difference(
    f: Callable[[np.ndarray], float], x: np.ndarray, direction: np.ndarray, step: float = 1e-5
) -> float:
    """The derivative of a float64 function along a direction."""
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)
