"""The device: its choice, buffers, uploads, reads and compiled pipelines."""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

# wgpu's Vulkan loader warns on every start where this is unset (containers, services).
if "XDG_RUNTIME_DIR" not in os.environ and os.name == "posix":
    os.environ["XDG_RUNTIME_DIR"] = tempfile.gettempdir()

import wgpu

from lora.shaders.errors import DeviceMemoryError, InputError
from lora.shaders.native import trusted_shader_module
from lora.shaders.templates import render
from lora.shaders.tensor import Extent, Tensor, item_bytes

ALIGNMENT = 256  # the largest offset alignment that WebGPU may ask of a binding
UPLOAD_PIECE = 8 << 20  # bytes: the staging memory of an upload never exceeds a few of these

_WANTED_FEATURES = ("timestamp-query", "shader-f16", "subgroup")
_WANTED_LIMITS = (
    "max-buffer-size",
    "max-storage-buffer-binding-size",
    "max-compute-workgroup-storage-size",
    "max-compute-invocations-per-workgroup",
    "max-compute-workgroup-size-x",
    "max-compute-workgroup-size-y",
    "max-storage-buffers-per-shader-stage",
)
_COMPUTE_BACKENDS = ("Vulkan", "Metal", "D3D12")


def list_devices() -> list[wgpu.GPUAdapter]:
    """The devices that can compute, in wgpu's order; OpenGL ones repeat these and are left out.

    WebGPU calls such a description of a device an adapter; here that word means LoRA's.
    """
    found = wgpu.gpu.enumerate_adapters_sync()
    return [a for a in found if a.info["backend_type"] in _COMPUTE_BACKENDS]


def choose_device(wanted: str | int = "auto") -> wgpu.GPUAdapter:
    """The device named by the config's `device:` key.

    Args:
        wanted: "auto" (a discrete GPU before an integrated one before a software driver), an index
            into `list_devices()`, or part of a name, in any case.

    Raises:
        InputError: no device at all, or none that fits.
    """
    found = list_devices()
    if not found:
        raise InputError(
            "WebGPU found no device on this machine. Install a Vulkan driver "
            "(Debian: apt-get install mesa-vulkan-drivers) and see `lora devices`."
        )
    listing = ", ".join(f"{i}: {a.info['device']}" for i, a in enumerate(found))
    text = str(wanted)
    if text == "auto":
        order = {"DiscreteGPU": 0, "IntegratedGPU": 1, "CPU": 2}
        return min(found, key=lambda a: order.get(a.info["adapter_type"], 3))
    if text.isdigit():
        if int(text) < len(found):
            return found[int(text)]
        raise InputError(f"device: {text}: there is no device of that index; there are {listing}.")
    for one in found:
        if text.lower() in one.info["device"].lower():
            return one
    raise InputError(f"device: {text!r}: no device has that in its name; there are {listing}.")


def padded_bytes(shape: tuple[int, ...], dtype: str = "f32") -> int:
    """Bytes of a buffer for that many elements."""
    n_bytes = item_bytes(dtype) * int(np.prod(shape, dtype=np.int64))
    return max(ALIGNMENT, -(-n_bytes // ALIGNMENT) * ALIGNMENT)


def _host_memory() -> int | None:
    """Bytes of memory of this machine; None where the system doesn't tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


class Device:
    """One WebGPU device with its queue, the memory taken from it, and its compiled pipelines.

    Args:
        wanted: see `choose_device`.
        limits: limits to request in place of the device's own (tests ask for WebGPU's defaults).

    Attributes:
        memory_limit: bytes of all buffers together; None where the device itself says when they
            are too many. A CPU device has the host's memory, and would be killed first.
        most_lanes: of a workgroup.
        most_storage_buffers: that one kernel may bind.
    """

    holds_data = True  # False for a device that only counts (shaders/planning.py)

    def __init__(self, wanted: str | int = "auto", limits: dict[str, int] | None = None) -> None:
        chosen = choose_device(wanted)
        self.info: dict[str, Any] = dict(chosen.info)
        self.name: str = chosen.info["device"]
        self.is_cpu = chosen.info["adapter_type"] == "CPU"
        self.features = {f for f in _WANTED_FEATURES if f in chosen.features}
        if limits is None:
            limits = {k: chosen.limits[k] for k in _WANTED_LIMITS if k in chosen.limits}
        self.wgpu: wgpu.GPUDevice = chosen.request_device_sync(
            required_features=sorted(self.features), required_limits=limits
        )
        self.queue: wgpu.GPUQueue = self.wgpu.queue
        self.max_binding = int(
            min(
                self.wgpu.limits["max-storage-buffer-binding-size"],
                self.wgpu.limits["max-buffer-size"],
            )
        )
        self.max_buffer = int(self.wgpu.limits["max-buffer-size"])
        self.workgroup_memory = int(self.wgpu.limits["max-compute-workgroup-storage-size"])
        self.most_lanes = int(
            min(
                self.wgpu.limits["max-compute-invocations-per-workgroup"],
                self.wgpu.limits["max-compute-workgroup-size-x"],
            )
        )
        self.most_storage_buffers = int(self.wgpu.limits["max-storage-buffers-per-shader-stage"])
        self.matmul_body: str | None = None  # a name of forward/matmul.py; None: by the device
        self.precision = "f32"  # of tiles and activations: f32, or f16 where "shader-f16" is there
        self.allocated: Counter[str] = Counter()  # bytes by purpose
        self.memory_limit: int | None = _host_memory() if self.is_cpu else None
        self._scratch: list[Tensor] = []
        self._constants: dict[tuple[int, ...], Tensor] = {}
        self._pipelines: dict[tuple[str, str], wgpu.GPUComputePipeline] = {}

    def copy_limits(self, other: Device) -> None:
        """Takes over what is known of another device, and none of its memory."""
        self.info, self.name, self.is_cpu = other.info, other.name, other.is_cpu
        self.features = other.features
        self.max_buffer, self.max_binding = other.max_buffer, other.max_binding
        self.workgroup_memory, self.most_lanes = other.workgroup_memory, other.most_lanes
        self.most_storage_buffers = other.most_storage_buffers
        self.matmul_body = other.matmul_body
        self.precision = other.precision
        self.allocated = Counter()
        self._scratch = []
        self._constants = {}

    @contextmanager
    def computing_in(self, precision: str) -> Iterator[None]:
        """Allocates activations and records products in f32 or f16 for a while.

        Raises:
            InputError: f16 on a device that lacks it.
        """
        if precision == "f16" and "shader-f16" not in self.features:
            raise InputError(
                f"train.precision: f16: {self.name} lacks WebGPU's shader-f16; set it to f32."
            )
        before, self.precision = self.precision, precision
        try:
            yield
        finally:
            self.precision = before

    # -- memory ---------------------------------------------------------------------------------

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
        """
        n_bytes = item_bytes(dtype) * int(np.prod(shape, dtype=np.int64))
        if n_bytes > self.max_binding:
            raise InputError(
                f"A tensor of shape {shape} ({n_bytes / 2**20:.0f} MiB) is larger than the "
                f"{self.max_binding / 2**20:.0f} MiB that {self.name} can bind; "
                "take fewer tokens at a time (data.max_length, train.batch_size, --max-length)."
            )
        return self._create(shape, dtype, purpose, extent)

    def empty_flat(self, n: int, *, purpose: str) -> Tensor:
        """A zero-filled f32 tensor [n] that may be larger than one binding: bind its ranges."""
        return self._create((n,), "f32", purpose, None)

    def scratch(self, shape: tuple[int, ...]) -> Tensor:
        """An f32 tensor for what one dispatch leaves to the next: all share the same memory.

        Ask for the largest first: the memory of smaller ones is not given back.
        """
        fitting = [tensor for tensor in self._scratch if tensor.size >= math.prod(shape)]
        if not fitting:
            fitting = [self.empty(shape, purpose="scratch")]
            self._scratch += fitting
        return replace(min(fitting, key=lambda tensor: tensor.size), shape=shape)

    @property
    def largest_scratch(self) -> int:
        """Elements of the largest scratch tensor so far."""
        return max((tensor.size for tensor in self._scratch), default=0)

    def _create(
        self, shape: tuple[int, ...], dtype: str, purpose: str, extent: Extent | None
    ) -> Tensor:
        padded = padded_bytes(shape, dtype)
        taken = sum(self.allocated.values())
        if self.memory_limit is not None and taken + padded > self.memory_limit:
            raise DeviceMemoryError(
                f"{self.name} has {self.memory_limit / 2**20:,.0f} MiB of memory"
            )
        usage = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_DST | wgpu.BufferUsage.COPY_SRC
        try:
            buffer = self.wgpu.create_buffer(size=padded, usage=usage)
        except wgpu.GPUError as error:
            raise DeviceMemoryError(
                f"{self.name} refused a buffer of {padded / 2**20:,.0f} MiB after "
                f"{taken / 2**20:,.0f} MiB of others ({str(error).splitlines()[0]})"
            ) from error
        self.allocated[purpose] += padded
        return Tensor(buffer, 0, tuple(shape), dtype, extent)

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
        self._write_bytes(tensor.buffer, tensor.offset, array, tensor.numpy_dtype)

    def write_rows(self, tensor: Tensor, first_row: int, array: np.ndarray) -> None:
        """Copies some whole rows (first dimension) of a tensor to the device."""
        row_bytes = tensor.n_bytes // tensor.shape[0]
        fits = 0 <= first_row <= tensor.shape[0] - len(array)
        if array.shape[1:] != tensor.shape[1:] or not fits:
            raise ValueError(f"{array.shape} from row {first_row} does not fit {tensor.shape}")
        offset = tensor.offset + first_row * row_bytes
        self._write_bytes(tensor.buffer, offset, array, tensor.numpy_dtype)

    def _write_bytes(
        self, buffer: wgpu.GPUBuffer, offset: int, array: np.ndarray, dtype: type[np.generic]
    ) -> None:
        flat = np.ascontiguousarray(array).astype(dtype, copy=False).reshape(-1)
        data = flat.view(np.uint8)
        for start in range(0, data.size, UPLOAD_PIECE):
            piece = data[start : start + UPLOAD_PIECE]
            self.queue.write_buffer(buffer, offset + start, piece)
            if data.size > UPLOAD_PIECE:
                # An empty submission makes wgpu hand back the staging memory of the writes so far.
                self.queue.submit([])

    def read(self, tensor: Tensor) -> np.ndarray:
        """The tensor's contents; waits for all work submitted before."""
        data = self.queue.read_buffer(tensor.buffer, tensor.offset, tensor.n_bytes)
        return np.frombuffer(data, tensor.numpy_dtype).reshape(tensor.shape).copy()

    def uniform(self, n_values: int = 4) -> Tensor:
        """A small u32 buffer for values that change from step to step, bound as a uniform."""
        usage = wgpu.BufferUsage.UNIFORM | wgpu.BufferUsage.COPY_DST | wgpu.BufferUsage.COPY_SRC
        buffer = self.wgpu.create_buffer(size=ALIGNMENT, usage=usage)
        return Tensor(buffer, 0, (n_values,), "u32")

    def constant_uniform(self, values: tuple[int, ...]) -> Tensor:
        """A uniform of up to four u32 that never change; one for all who ask for the same."""
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

    # -- pipelines ------------------------------------------------------------------------------

    def pipeline(self, template: str, constants: dict[str, Any]) -> wgpu.GPUComputePipeline:
        """The compiled kernel of a WGSL template under its constants, compiled once."""
        key = (template, repr(sorted(constants.items())))
        if key not in self._pipelines:
            self._pipelines[key] = self.compile(template, render(template, constants))
        return self._pipelines[key]

    def compile(self, label: str, code: str) -> wgpu.GPUComputePipeline:
        """The pipeline of a kernel's WGSL text, whose entry point is `main`."""
        module = trusted_shader_module(self.wgpu, label, code)
        return self.wgpu.create_compute_pipeline(
            label=label, layout="auto", compute={"module": module, "entry_point": "main"}
        )

    def bind_group(
        self, pipeline: wgpu.GPUComputePipeline, tensors: Iterable[Tensor]
    ) -> wgpu.GPUBindGroup:
        """Binds tensors to @group(0), in the order of their @binding numbers."""
        return self.wgpu.create_bind_group(
            layout=pipeline.get_bind_group_layout(0),
            entries=[{"binding": i, "resource": t.binding()} for i, t in enumerate(tensors)],
        )
