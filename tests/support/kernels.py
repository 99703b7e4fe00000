"""What the kernels' tests share: activations of which not all rows are in use, and derivatives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lora.shaders.device import Device
from lora.shaders.program import Program
from lora.shaders.tensor import Extent, Tensor

MARKER = -7.0  # what outputs hold before a kernel runs: rows not in use must keep it


def extent_in_use(device: Device, rows: int, in_use: int) -> Extent:
    """An extent of `rows`, of which `in_use` are."""
    extent = device.extent(rows)
    device.set_rows(extent, in_use)
    return extent


def activation(device: Device, values: np.ndarray, extent: Extent) -> Tensor:
    """An activation holding `values` [rows, …]."""
    floating = np.issubdtype(values.dtype, np.floating)
    tensor = device.empty(values.shape, "f32" if floating else "u32", extent=extent)
    device.write(tensor, values)
    return tensor


def marked(device: Device, extent: Extent, *shape: int) -> Tensor:
    """An output [extent.maximum, *shape] filled with MARKER."""
    tensor = device.empty((extent.maximum, *shape), extent=extent)
    device.write(tensor, np.full(tensor.shape, MARKER, np.float32))
    return tensor


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
