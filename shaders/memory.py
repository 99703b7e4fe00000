"""Who owns memory on the device, and gives it back: arenas, and one that only counts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, Self
from weakref import WeakSet

import numpy as np

from lora.shaders.errors import InputError, LoraError
from lora.shaders.facts import DeviceFacts
from lora.shaders.tensor import Extent, Tensor, item_bytes
from lora.shaders.webgpu import BindGroup, Buffer, OpenDevice, Pipeline, Use

ALIGNMENT = 256  # the largest offset alignment that WebGPU may ask of a binding
_N_SCRATCH = 3  # scratch memories that a dispatch may use together
UPLOAD_PIECE = 8 << 20  # bytes: the staging memory of an upload never exceeds a few of these


def padded_bytes(shape: tuple[int, ...], dtype: str = "f32") -> int:
    """Bytes of a buffer for that many elements."""
    n_bytes = item_bytes(dtype) * math.prod(shape)
    return max(ALIGNMENT, -(-n_bytes // ALIGNMENT) * ALIGNMENT)


class Memory(ABC):
    """An owner of tensors.

    Args:
        facts: of the device.
        outer: an owner whose scratch memory and constants this one shares.

    Attributes:
        allocated: bytes by purpose.
        holds_data: False where tensors are only counted.
    """

    holds_data = True

    def __init__(self, facts: DeviceFacts, outer: Memory | None = None) -> None:
        self.facts = facts
        self.allocated: Counter[str] = Counter()
        self._outer = outer
        self._scratch: tuple[list[Tensor], ...] = tuple([] for _ in range(_N_SCRATCH))
        self._constants: dict[tuple[int, ...], Tensor] = {}
        self._of_rows: dict[int, Tensor] = {}

    # -- what differs between owners --------------------------------------------------------------

    @abstractmethod
    def _buffer(self, n_bytes: int, use: Use) -> Any:
        """A new buffer of zeros; None where nothing is held."""

    @abstractmethod
    def _write_bytes(self, buffer: Any, offset: int, data: np.ndarray) -> None:
        """Copies bytes u8 [n] into a buffer."""

    @abstractmethod
    def inner(self) -> Memory:
        """An owner of its own within this one, that may be closed before it."""

    @abstractmethod
    def kernel(self, template: str, constants: Mapping[str, Any]) -> Pipeline:
        """The compiled kernel of a template; None where nothing is held."""

    @abstractmethod
    def compile(self, label: str, code: str) -> Pipeline:
        """The compiled kernel of a WGSL text; None where nothing is held."""

    @abstractmethod
    def bind(self, pipeline: Pipeline, tensors: Sequence[Tensor]) -> BindGroup:
        """Tensors bound in the order of their @binding numbers; None where nothing is held."""

    @abstractmethod
    def read(self, tensor: Tensor) -> np.ndarray:
        """The tensor's contents; waits for all work submitted before."""

    @abstractmethod
    def close(self) -> None:
        """Gives everything back; programs on it cannot run any more."""

    @property
    @abstractmethod
    def handle(self) -> OpenDevice:
        """The device that runs what is recorded."""

    # -- tensors --------------------------------------------------------------------------------

    def empty(
        self,
        shape: tuple[int, ...],
        dtype: str = "f32",
        *,
        purpose: str = "activations",
        extent: Extent | None = None,
    ) -> Tensor:
        """A new tensor, zero-filled (WebGPU zeroes every new buffer).

        Args:
            shape: row-major sizes.
            dtype: "f32", "u32" or "f16".
            purpose: what the memory is counted under in `allocated`.
            extent: for activations, which of the rows are in use.

        Raises:
            InputError: larger than one buffer can be on this device.
            DeviceMemoryError: there is no room for it.
        """
        n_bytes = item_bytes(dtype) * int(np.prod(shape, dtype=np.int64))
        if n_bytes > self.facts.max_binding:
            raise InputError(
                f"A tensor of shape {shape} ({n_bytes / 2**20:.0f} MiB) is larger than the "
                f"{self.facts.max_binding / 2**20:.0f} MiB that {self.facts.name} can bind; "
                "take fewer tokens at a time (data.max_length, train.batch_size, --max-length)."
            )
        return self._create(shape, dtype, purpose, extent)

    def empty_flat(self, n: int, *, purpose: str) -> Tensor:
        """A zero-filled f32 tensor [n] that may be larger than one binding: bind its ranges."""
        return self._create((n,), "f32", purpose, None)

    def _create(
        self, shape: tuple[int, ...], dtype: str, purpose: str, extent: Extent | None
    ) -> Tensor:
        n_bytes = padded_bytes(shape, dtype)
        buffer = self._buffer(n_bytes, Use.STORAGE)
        self.allocated[purpose] += n_bytes
        return Tensor(buffer, 0, tuple(shape), dtype, extent)

    def scratch(self, shape: tuple[int, ...], *, beside: int = 0) -> Tensor:
        """An f32 tensor for what one dispatch leaves to the next: all share the same memory.

        Ask for the largest first: the memory of smaller ones is not given back.

        Args:
            beside: which other memory, for what is in use together with the first: 1 of sums, where
                weights are decoded into that, 2 of rows in f16.
        """
        if self._outer is not None:
            return self._outer.scratch(shape, beside=beside)
        shared = self._scratch[beside]
        fitting = [tensor for tensor in shared if tensor.size >= math.prod(shape)]
        if not fitting:
            fitting = [self.empty(shape, purpose="scratch")]
            shared += fitting
        return replace(min(fitting, key=lambda tensor: tensor.size), shape=shape)

    def row_scratch(self, rows: int) -> Tensor:
        """As that, a u32 a row, which may be in use beside it: all who ask for so many share it."""
        if self._outer is not None:
            return self._outer.row_scratch(rows)
        if rows not in self._of_rows:
            self._of_rows[rows] = self.empty((rows,), "u32")
        return self._of_rows[rows]

    @property
    def largest_scratch(self) -> tuple[int, ...]:
        """Elements of the largest scratch tensor so far, and of the largest ones beside it."""
        return tuple(max((t.size for t in shared), default=0) for shared in self._scratch)

    def upload(self, array: np.ndarray, *, purpose: str = "weights") -> Tensor:
        """A new tensor with the array's contents (float → f32, integer → u32)."""
        floating = np.issubdtype(array.dtype, np.floating)
        tensor = self.empty(array.shape, "f32" if floating else "u32", purpose=purpose)
        self.write(tensor, array)
        return tensor

    def write(self, tensor: Tensor, array: np.ndarray) -> None:
        """Copies an array of the tensor's shape to the device, in pieces."""
        if array.shape != tensor.shape:
            raise ValueError(f"{array.shape} does not fit {tensor.shape}")
        self._write_array(tensor, tensor.offset, array)

    def write_rows(self, tensor: Tensor, first_row: int, array: np.ndarray) -> None:
        """Copies some whole rows (first dimension) of a tensor to the device."""
        row_bytes = tensor.n_bytes // tensor.shape[0]
        fits = 0 <= first_row <= tensor.shape[0] - len(array)
        if array.shape[1:] != tensor.shape[1:] or not fits:
            raise ValueError(f"{array.shape} from row {first_row} does not fit {tensor.shape}")
        self._write_array(tensor, tensor.offset + first_row * row_bytes, array)

    def _write_array(self, tensor: Tensor, offset: int, array: np.ndarray) -> None:
        flat = np.ascontiguousarray(array).astype(tensor.numpy_dtype, copy=False).reshape(-1)
        self._write_bytes(tensor.buffer, offset, flat.view(np.uint8))

    # -- uniforms -------------------------------------------------------------------------------

    def uniform(self, n_values: int = 4) -> Tensor:
        """A small u32 buffer for values that change from step to step, bound as a uniform."""
        return Tensor(self._buffer(ALIGNMENT, Use.UNIFORM), 0, (n_values,), "u32")

    def constant_uniform(self, values: tuple[int, ...]) -> Tensor:
        """A uniform of up to four u32 that never change; one for all who ask for the same."""
        if self._outer is not None:
            return self._outer.constant_uniform(values)
        if values not in self._constants:
            self._constants[values] = self.uniform()
            padded = [*values, *[0] * (4 - len(values))]
            self.write(self._constants[values], np.array(padded, np.uint32))
        return self._constants[values]

    def extent(self, maximum: int) -> Extent:
        """An extent of `maximum` rows, all of them in use until `set_rows` says otherwise."""
        extent = Extent(maximum, self.uniform())
        self.set_rows(extent, maximum)
        return extent

    def set_rows(self, extent: Extent, rows: int) -> None:
        """Sets how many rows are in use in what is submitted from now on."""
        if not 0 <= rows <= extent.maximum:
            raise ValueError(f"{rows} rows do not fit an extent of {extent.maximum}")
        self.write(extent.uniform, np.array([rows, 0, 0, 0], np.uint32))


class Owned(Protocol):
    """A device as its arenas know it; see `device.Device`."""

    facts: DeviceFacts

    @property
    def handle(self) -> OpenDevice:
        """The implementation's device."""

    def join(self, arena: Arena) -> None:
        """Counts an arena as long as it lives."""

    def create_buffer(self, n_bytes: int, use: Use) -> Buffer:
        """A buffer of zeros."""

    def pipeline(self, template: str, constants: dict[str, Any]) -> Pipeline:
        """The compiled kernel of a template."""

    def compile(self, label: str, code: str) -> Pipeline:
        """The compiled kernel of a WGSL text."""


class Arena(Memory):
    """Memory of one owner on a device, given back together: a context manager.

    Args:
        device: which.
        outer: see `Memory`; an outer arena closes its inner ones.
    """

    def __init__(self, device: Owned, outer: Arena | None = None) -> None:
        super().__init__(device.facts, outer)
        self._device = device
        self._buffers: list[Buffer] = []
        self._inner: WeakSet[Arena] = WeakSet()
        self._closed = False
        device.join(self)

    @property
    def handle(self) -> OpenDevice:
        """The device that runs what is recorded.

        Raises:
            LoraError: the arena is closed. wgpu-native would end the process.
        """
        self._check_open()
        return self._device.handle

    def _check_open(self) -> None:
        if self._closed:
            raise LoraError(f"This was closed: its memory on {self.facts.name} was given back.")

    def inner(self) -> Arena:
        """An arena within this one, that may be closed before it."""
        self._check_open()
        arena = Arena(self._device, self)
        self._inner.add(arena)
        return arena

    def staging(self, n_bytes: int) -> Buffer:
        """A buffer that is copied into and then mapped for the host."""
        return self._buffer(n_bytes, Use.RESULT)

    def source(self, n_bytes: int) -> Buffer:
        """A buffer that the host maps and writes, and that is then copied from."""
        return self._buffer(n_bytes, Use.SOURCE)

    def _buffer(self, n_bytes: int, use: Use) -> Buffer:
        self._check_open()
        buffer = self._device.create_buffer(n_bytes, use)
        self._buffers.append(buffer)
        return buffer

    def _write_bytes(self, buffer: Buffer, offset: int, data: np.ndarray) -> None:
        for start in range(0, data.size, UPLOAD_PIECE):
            piece = data[start : start + UPLOAD_PIECE]
            self.handle.write(buffer, offset + start, piece)
            if data.size > UPLOAD_PIECE:
                self.handle.release_staging()

    def kernel(self, template: str, constants: Mapping[str, Any]) -> Pipeline:
        """The compiled kernel of a template; its device keeps it."""
        self._check_open()
        return self._device.pipeline(template, dict(constants))

    def compile(self, label: str, code: str) -> Pipeline:
        """The compiled kernel of a WGSL text."""
        self._check_open()
        return self._device.compile(label, code)

    def bind(self, pipeline: Pipeline, tensors: Sequence[Tensor]) -> BindGroup:
        """Tensors bound in the order of their @binding numbers."""
        return self.handle.bind_group(pipeline, [(t.buffer, t.offset, t.n_bytes) for t in tensors])

    def read(self, tensor: Tensor) -> np.ndarray:
        """The tensor's contents; waits for all work submitted before."""
        data = self.handle.read(tensor.buffer, tensor.offset, tensor.n_bytes)
        return np.frombuffer(data, tensor.numpy_dtype).reshape(tensor.shape).copy()

    def close(self) -> None:
        """Gives back all memory, that of inner arenas too; programs on it cannot run any more."""
        for arena in list(self._inner):
            arena.close()
        for buffer in self._buffers:
            buffer.destroy()
        self._buffers.clear()
        for shared in self._scratch:
            shared.clear()
        self._constants.clear()
        self._of_rows.clear()
        self.allocated.clear()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CountingMemory(Memory):
    """Stands in for memory on a device, to learn what a program would take.

    Tensors have no buffer, writes go nowhere, kernels are not compiled; `allocated` counts just
    as on the device itself, because the same code asks for memory. Of scratch memory the largest
    alone counts: who knows that asks for it first.
    """

    holds_data = False

    def scratch(self, shape: tuple[int, ...], *, beside: int = 0) -> Tensor:
        """As there; a larger one takes the place of the one before."""
        if self._outer is None and math.prod(shape) > self.largest_scratch[beside]:
            for smaller in self._scratch[beside]:
                self.allocated["scratch"] -= padded_bytes(smaller.shape, smaller.dtype)
            self._scratch[beside].clear()
        return super().scratch(shape, beside=beside)

    def _buffer(self, n_bytes: int, use: Use) -> Any:
        return None

    def _write_bytes(self, buffer: Any, offset: int, data: np.ndarray) -> None:
        pass

    def inner(self) -> CountingMemory:
        """Another that shares its scratch memory, and is counted with it."""
        within = CountingMemory(self.facts, self)
        within.allocated = self.allocated
        return within

    def kernel(self, template: str, constants: Mapping[str, Any]) -> Pipeline:
        """Nothing is compiled."""
        return None

    def compile(self, label: str, code: str) -> Pipeline:
        """Nothing is compiled."""
        return None

    def bind(self, pipeline: Pipeline, tensors: Sequence[Tensor]) -> BindGroup:
        """Nothing is bound."""
        return None

    def close(self) -> None:
        """There is nothing to give back; what was counted stays so."""

    def read(self, tensor: Tensor) -> np.ndarray:
        """Refused: there is nothing to read."""
        raise ValueError("memory that only counts holds no data")

    @property
    def handle(self) -> OpenDevice:
        """Refused: there is no device behind it."""
        raise ValueError("what is recorded on memory that only counts cannot run")
