"""wgpu-native behind shaders/webgpu.py, through wgpu-py and, where that offers too little, through
wgpu-py's inner functions.

The dependency is pinned below 0.33, and tests/shaders/test_native.py holds what is used here.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
import wgpu

from lora.shaders.errors import GPUError
from lora.shaders.webgpu import Buffer, Encoder, Found, Launch, Stamps, Use

_NO_CHECKS = 0  # WGPUShaderRuntimeChecks_None of wgpu.h
# wgpu-native (wgpu-py 0.32) ended the process where two threads opened devices at once (H100).
_OPENING = Lock()
_USAGES = {
    Use.STORAGE: wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_DST | wgpu.BufferUsage.COPY_SRC,
    Use.UNIFORM: wgpu.BufferUsage.UNIFORM | wgpu.BufferUsage.COPY_DST | wgpu.BufferUsage.COPY_SRC,
    Use.RESULT: wgpu.BufferUsage.MAP_READ | wgpu.BufferUsage.COPY_DST,
}
# wgpu-native asks Vulkan for robust buffer access and D3D12 has it for descriptor tables; Metal
# has none.
_BOUNDS_ARE_KEPT = ("Vulkan", "D3D12")


@cache
def _inner() -> Any:
    """wgpu-py's module of inner functions; its import parses wgpu.h, a third of a second."""
    from wgpu.backends.wgpu_native import _api

    return _api


@contextmanager
def _translated_errors() -> Iterator[None]:
    """wgpu-py's errors as this project's."""
    try:
        yield
    except wgpu.GPUError as error:
        raise GPUError(str(error)) from error


@contextmanager
def _quiet_loader() -> Iterator[None]:
    """The Vulkan loader warns where XDG_RUNTIME_DIR is unset (containers, services)."""
    if "XDG_RUNTIME_DIR" in os.environ or os.name != "posix":
        yield
        return
    os.environ["XDG_RUNTIME_DIR"] = tempfile.gettempdir()
    try:
        yield
    finally:
        del os.environ["XDG_RUNTIME_DIR"]


class WgpuNative:
    """See `webgpu.Implementation`."""

    name = "wgpu-native"
    version: str = wgpu.__version__

    def found(self) -> list[Found]:
        """See `webgpu.Implementation`."""
        with _OPENING, _quiet_loader():
            return [_Found(adapter) for adapter in wgpu.gpu.enumerate_adapters_sync()]


class _Found:
    """See `webgpu.Found`."""

    def __init__(self, adapter: wgpu.GPUAdapter) -> None:
        self._adapter = adapter
        self.info: dict[str, Any] = dict(adapter.info)
        self.features = frozenset(adapter.features)
        self.limits: dict[str, int] = dict(adapter.limits)
        self.bounds_are_kept = self.info["backend_type"] in _BOUNDS_ARE_KEPT

    def open(self, features: Iterable[str], limits: Mapping[str, int]) -> NativeDevice:
        """See `webgpu.Found`."""
        with _OPENING, _quiet_loader(), _translated_errors():
            device = self._adapter.request_device_sync(
                required_features=sorted(features), required_limits=dict(limits)
            )
        return NativeDevice(device)


class NativeDevice:
    """See `webgpu.OpenDevice`."""

    def __init__(self, device: wgpu.GPUDevice) -> None:
        self.wgpu = device
        self._queue: wgpu.GPUQueue = device.queue
        self.limits: dict[str, int] = dict(device.limits)

    def create_buffer(self, n_bytes: int, use: Use) -> Buffer:
        """See `webgpu.OpenDevice`."""
        with _translated_errors():
            buffer: Buffer = self.wgpu.create_buffer(size=n_bytes, usage=_USAGES[use])
            return buffer

    def write(self, buffer: Buffer, offset: int, data: Any) -> None:
        """See `webgpu.OpenDevice`."""
        self._queue.write_buffer(buffer, offset, data)

    def release_staging(self) -> None:
        """See `webgpu.OpenDevice`. An empty submission makes wgpu hand that memory back."""
        self._queue.submit([])

    def read(self, buffer: Buffer, offset: int, n_bytes: int) -> memoryview:
        """See `webgpu.OpenDevice`."""
        with _translated_errors():
            data: memoryview = self._queue.read_buffer(buffer, offset, n_bytes)
            return data

    def map_for_reading(self, buffer: Buffer) -> _Mapped:
        """See `webgpu.OpenDevice`.

        wgpu-py's `map_async` wakes a thread that waits until all submitted work is done, and while
        it waits nobody else can submit: a GPU stood still between steps (docs/log.md). It also
        submits an empty command buffer first, which the copy into this buffer has made needless.
        """
        poller, self.wgpu._poller = self.wgpu._poller, _NoPoller()
        try:
            return _Mapped(buffer, buffer.map_async("READ_NOSYNC"))  # type: ignore[attr-defined]
        finally:
            self.wgpu._poller = poller

    def poll(self) -> None:
        """See `webgpu.OpenDevice`. wgpu-py's blocking poll waits for later steps, too."""
        self.wgpu._poll()

    def compile(self, label: str, code: str, *, checked: bool) -> wgpu.GPUComputePipeline:
        """See `webgpu.OpenDevice`."""
        with _translated_errors():
            if checked:
                module = self.wgpu.create_shader_module(label=label, code=code)
            else:
                module = _trusted_shader_module(self.wgpu, label, code)
            return self.wgpu.create_compute_pipeline(
                label=label, layout="auto", compute={"module": module, "entry_point": "main"}
            )

    def bind_group(
        self, pipeline: wgpu.GPUComputePipeline, ranges: Sequence[tuple[Buffer, int, int]]
    ) -> wgpu.GPUBindGroup:
        """See `webgpu.OpenDevice`."""
        with _translated_errors():
            return self.wgpu.create_bind_group(
                layout=pipeline.get_bind_group_layout(0),
                entries=[
                    {"binding": i, "resource": {"buffer": buffer, "offset": offset, "size": size}}
                    for i, (buffer, offset, size) in enumerate(ranges)
                ],
            )

    def query_set(self, count: int) -> wgpu.GPUQuerySet:
        """See `webgpu.OpenDevice`."""
        return self.wgpu.create_query_set(type="timestamp", count=count)

    def encoder(self) -> _Encoder:
        """See `webgpu.OpenDevice`."""
        return _Encoder(self.wgpu.create_command_encoder())

    def submit(self, commands: wgpu.GPUCommandBuffer) -> None:
        """See `webgpu.OpenDevice`."""
        with _translated_errors():
            self._queue.submit([commands])

    def submit_timed(self, encoder: Encoder, queries: wgpu.GPUQuerySet, count: int) -> list[int]:
        """See `webgpu.OpenDevice`.

        wgpu gives ticks; one tick is one nanosecond on every device seen (NVIDIA, llvmpipe).
        """
        usage = wgpu.BufferUsage.QUERY_RESOLVE | wgpu.BufferUsage.COPY_SRC
        resolved = self.wgpu.create_buffer(size=8 * count, usage=usage)
        assert isinstance(encoder, _Encoder)
        encoder.inner.resolve_query_set(queries, 0, count, resolved, 0)
        self.submit(encoder.finish())
        ticks = np.frombuffer(self.read(resolved, 0, 8 * count), np.uint64)
        resolved.destroy()
        return [int(tick) for tick in ticks]

    def close(self) -> None:
        """See `webgpu.OpenDevice`."""
        self.wgpu.destroy()


class _Encoder:
    """See `webgpu.Encoder`."""

    def __init__(self, inner: wgpu.GPUCommandEncoder) -> None:
        self.inner = inner

    def dispatches(self, launches: Iterable[Launch], stamps: Stamps | None = None) -> None:
        """See `webgpu.Encoder`."""
        options: dict[str, Any] = {}
        if stamps is not None:
            queries, before, after = stamps
            options["timestamp_writes"] = {
                "query_set": queries,
                "beginning_of_pass_write_index": before,
                "end_of_pass_write_index": after,
            }
        compute_pass = self.inner.begin_compute_pass(**options)
        _encode_dispatches(compute_pass, launches)
        compute_pass.end()

    def copy(
        self, source: Buffer, source_offset: int, target: Buffer, offset: int, n_bytes: int
    ) -> None:
        """See `webgpu.Encoder`."""
        self.inner.copy_buffer_to_buffer(source, source_offset, target, offset, n_bytes)

    def clear(self, buffer: Buffer, offset: int, n_bytes: int) -> None:
        """See `webgpu.Encoder`."""
        self.inner.clear_buffer(buffer, offset, n_bytes)

    def finish(self) -> wgpu.GPUCommandBuffer:
        """See `webgpu.Encoder`."""
        with _translated_errors():
            return self.inner.finish()


class _Mapped:
    """See `webgpu.Mapped`."""

    def __init__(self, buffer: Any, promise: Any) -> None:
        self._buffer = buffer
        self._promise = promise

    def arrived(self) -> bool:
        """See `webgpu.Mapped`."""
        return bool(self._promise._state != "pending")

    def take(self) -> bytes:
        """See `webgpu.Mapped`."""
        with _translated_errors():
            self._promise.sync_wait()
            data = bytes(self._buffer.read_mapped())
            self._buffer.unmap()
        return data


class _NoPoller:
    """Stands in for a device's polling thread: nothing is to be waited for there."""

    def get_token(self) -> _NoPoller:
        return self

    def set_done(self) -> None:
        """The end of what was never begun."""


def _trusted_shader_module(device: wgpu.GPUDevice, label: str, code: str) -> wgpu.GPUShaderModule:
    """Compiles WGSL as `device.create_shader_module` does, without run-time checks.

    For code it can't trust wgpu clamps every dynamic index and counts the turns of every loop. Our
    kernels are our own: their loops end and their indices stay in range, and the checks cost a
    tenth of a matmul's speed (docs/log.md). The driver's robust buffer access stays on: a stray
    read cannot leave its buffer.
    """
    api = _inner()
    source = api.new_struct_p("WGPUShaderSourceWGSL *", code=api.to_c_string_view(code))
    source[0].chain.next = api.ffi.NULL
    source[0].chain.sType = api.lib.WGPUSType_ShaderSourceWGSL
    descriptor = api.new_struct_p(
        "WGPUShaderModuleDescriptor *",
        nextInChain=api.ffi.cast("WGPUChainedStruct *", source),
        label=api.to_c_string_view(label),
    )
    module = api.libf.wgpuDeviceCreateShaderModuleTrusted(device._internal, descriptor, _NO_CHECKS)
    return api.GPUShaderModule(label, module, device)


def _encode_dispatches(
    compute_pass: wgpu.GPUComputePassEncoder, launches: Iterable[Launch]
) -> None:
    """Appends launches to a pass.

    As the pass's own methods do, but without their error scope around each of three calls: a step
    has a thousand dispatches. What is wrong shows when the encoder finishes.
    """
    lib, no_offsets = _inner().lib, _inner().ffi.NULL
    set_pipeline = lib.wgpuComputePassEncoderSetPipeline
    set_bind_group = lib.wgpuComputePassEncoderSetBindGroup
    dispatch = lib.wgpuComputePassEncoderDispatchWorkgroups
    inner = compute_pass._internal
    last = None
    for pipeline, bind_group, (x, y, z) in launches:
        if pipeline is not last:
            set_pipeline(inner, pipeline._internal)
            last = pipeline
        set_bind_group(inner, 0, bind_group._internal, 0, no_offsets)
        dispatch(inner, x, y, z)
