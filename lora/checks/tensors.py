"""Tensors that kernels are checked with: some rows are not in use, outputs hold a marker."""

from __future__ import annotations

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from lora.forward.gguf.file import GGUFTensor
from lora.forward.gguf.quantization import quantize
from lora.forward.model.weights import FrozenMatrix, load_matrix
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor

MARKER = -7.0  # what outputs hold before a kernel runs: rows not in use must keep it


def extent_in_use(recording: Recording, rows: int, in_use: int) -> Extent:
    """An extent of `rows`, of which `in_use` are."""
    extent = recording.memory.extent(rows)
    recording.memory.set_rows(extent, in_use)
    return extent


def activation(recording: Recording, values: np.ndarray, extent: Extent) -> Tensor:
    """An activation holding `values` [rows, …]."""
    floating = np.issubdtype(values.dtype, np.floating)
    tensor = recording.memory.empty(values.shape, "f32" if floating else "u32", extent=extent)
    recording.memory.write(tensor, values)
    return tensor


def marked(recording: Recording, extent: Extent, *shape: int) -> Tensor:
    """An output [extent.maximum, *shape] filled with MARKER."""
    tensor = recording.memory.empty((extent.maximum, *shape), extent=extent)
    recording.memory.write(tensor, np.full(tensor.shape, MARKER, np.float32))
    return tensor


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """f32 values as a tensor of that type holds them."""
    return values.astype(np.float16 if dtype == "f16" else np.float32).astype(np.float32)


def typed(recording: Recording, values: np.ndarray, dtype: str, extent: Extent) -> Tensor:
    """An activation of that type holding `values` [rows, …]."""
    tensor = recording.memory.empty(values.shape, dtype, extent=extent)
    recording.memory.write(tensor, values)
    return tensor


def typed_marked(recording: Recording, dtype: str, extent: Extent, *shape: int) -> Tensor:
    """An output [extent.maximum, *shape] of that type filled with MARKER."""
    return typed(recording, np.full((extent.maximum, *shape), MARKER), dtype, extent)


def normal(seed: int, *shape: int) -> np.ndarray:
    """f32 numbers, normally distributed."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def frozen(
    recording: Recording, kind: GGMLQuantizationType, rows: int, columns: int, seed: int = 0
) -> tuple[FrozenMatrix, np.ndarray]:
    """A random matrix [rows, columns] on the device, and what it decodes to in float64."""
    data = quantize(normal(seed, rows, columns), kind)
    tensor = GGUFTensor("checked", kind, (rows, columns), data)
    values = gguf.quants.dequantize(data, kind).reshape(rows, columns)
    return load_matrix(recording, [tensor]), values.astype(np.float64)
