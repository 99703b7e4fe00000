"""Tensors on the device: a range of a buffer with a shape."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from lora.shaders.webgpu import Buffer

# Quantized weights are arrays of u32 words.
NUMPY_TYPES: dict[str, type[np.float32] | type[np.uint32] | type[np.float16]] = {
    "f32": np.float32,
    "u32": np.uint32,
    "f16": np.float16,
}


def item_bytes(dtype: str) -> int:
    """Bytes of one element."""
    return np.dtype(NUMPY_TYPES[dtype]).itemsize


@dataclass(frozen=True)
class Extent:
    """How many rows of the activations are in use in the current step.

    Programs are recorded for `maximum` rows; the host writes the number actually used into
    `uniform` (u32 [4]; the first is the row count, the others are spare) before each replay, and
    every kernel stops there. Rows beyond it hold stale numbers that nothing reads.
    """

    maximum: int
    uniform: Tensor


@dataclass(frozen=True)
class Tensor:
    """A view of a device buffer.

    Attributes:
        buffer: that holds it; memory that only counts has none.
        offset: where it begins, in bytes; a multiple of 256, so that it can be bound anywhere.
        shape: row-major sizes.
        dtype: "f32", "u32" or, for activations under `precision: f16`, "f16".
        extent: for activations, which rows (first dimension) are in use; None means all.
    """

    buffer: Buffer
    offset: int
    shape: tuple[int, ...]
    dtype: str = "f32"
    extent: Extent | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes it takes in the buffer."""
        return self.size * item_bytes(self.dtype)

    @property
    def numpy_dtype(self) -> type[np.float32] | type[np.uint32] | type[np.float16]:
        """The numpy type of its elements."""
        return NUMPY_TYPES[self.dtype]

    def reshape(self, *shape: int) -> Tensor:
        """The same elements under another shape."""
        if math.prod(shape) != self.size:
            raise ValueError(f"cannot view {self.shape} as {shape}")
        return replace(self, shape=shape)

    def slice(self, start: int, stop: int) -> Tensor:
        """Rows start to stop (first dimension), without a copy.

        The first byte must lie on a multiple of 256 (the strictest binding alignment of WebGPU).
        """
        row_bytes = self.n_bytes // self.shape[0]
        offset = self.offset + start * row_bytes
        if offset % 256:
            raise ValueError(f"row {start} of {self.shape} begins at byte {offset}, not on 256")
        return replace(self, offset=offset, shape=(stop - start, *self.shape[1:]))
