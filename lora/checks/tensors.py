"""Tensors that kernels are checked with: some rows are not in use, outputs hold a marker."""

from __future__ import annotations

import numpy as np

from lora.shaders.device import Device
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


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """f32 values as a tensor of that type holds them."""
    return values.astype(np.float16 if dtype == "f16" else np.float32).astype(np.float32)


def typed(device: Device, values: np.ndarray, dtype: str, extent: Extent) -> Tensor:
    """An activation of that type holding `values` [rows, …]."""
    tensor = device.empty(values.shape, dtype, extent=extent)
    device.write(tensor, values)
    return tensor


def typed_marked(device: Device, dtype: str, extent: Extent, *shape: int) -> Tensor:
    """An output [extent.maximum, *shape] of that type filled with MARKER."""
    return typed(device, np.full((extent.maximum, *shape), MARKER), dtype, extent)
