"""What wgpu-py and wgpudawn have in common, behind shaders/webgpu.py: the same classes and methods.

Each implementation's file gives its package and its inner module, and overrides what differs. What
is used of the inner modules here is the same in both: `lib` (webgpu.h's functions) and `ffi`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from lora.shaders.errors import GPUError
from lora.shaders.webgpu import Buffer, Encoder, Launch, Stamps, Use


@contextmanager
def quiet_loader() -> Iterator[None]:
    """The Vulkan loader warns where XDG_RUNTIME_DIR is unset (containers, services)."""
    if "XDG_RUNTIME_DIR" in os.environ or os.name != "posix":
        yield
        return
    os.environ["XDG_RUNTIME_DIR"] = tempfile.gettempdir()
    try:
        yield
    finally:
        del os.environ["XDG_RUNTIME_DIR"]


@contextmanager
def translated(errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """A package's errors as this project's."""
    try:
        yield
    except errors as error:
        raise GPUError(str(error)) from error


class PythonDevice:
    """See `webgpu.OpenDevice`.

    Args:
        device: the package's GPUDevice.
        package: the module `wgpu` or `wgpudawn`.
        inner: its backend's module of inner functions.
        errors: what that raises for what WebGPU refuses.
    """

    def __init__(
        self, device: Any, package: Any, inner: Any, errors: tuple[type[Exception], ...]
    ) -> None:
        self.wgpu = device
        self._queue = device.queue
        self._inner = inner
        self._errors = errors
        self.limits: dict[str, int] = dict(device.limits)
        use = package.BufferUsage
        self._usages = {
            Use.STORAGE: use.STORAGE | use.COPY_DST | use.COPY_SRC,
            Use.UNIFORM: use.UNIFORM | use.COPY_DST | use.COPY_SRC,
            Use.RESULT: use.MAP_READ | use.COPY_DST,
            Use.SOURCE: use.MAP_WRITE | use.COPY_SRC,
        }
        self._stamps_usage = use.QUERY_RESOLVE | use.COPY_SRC

    def create_buffer(self, n_bytes: int, use: Use) -> Buffer:
        """See `webgpu.OpenDevice`."""
        with translated(self._errors):
            buffer: Buffer = self.wgpu.create_buffer(size=n_bytes, usage=self._usages[use])
            return buffer

    def write(self, buffer: Buffer, offset: int, data: Any) -> None:
        """See `webgpu.OpenDevice`."""
        with translated(self._errors):
            self._queue.write_buffer(buffer, offset, data)

    def release_staging(self) -> None:
        """See `webgpu.OpenDevice`. An empty submission makes wgpu hand that memory back."""
        with translated(self._errors):
            self._queue.submit([])

    def read(self, buffer: Buffer, offset: int, n_bytes: int) -> memoryview:
        """See `webgpu.OpenDevice`."""
        with translated(self._errors):
            data: memoryview = self._queue.read_buffer(buffer, offset, n_bytes)
            return data

    def map_for_reading(self, buffer: Buffer) -> PythonMapped:
        """See `webgpu.OpenDevice`."""
        return self._mapped(buffer, "READ")

    def map_for_writing(self, buffer: Buffer) -> PythonMapped:
        """See `webgpu.OpenDevice`."""
        return self._mapped(buffer, "WRITE")

    def _mapped(self, buffer: Any, mode: str) -> PythonMapped:
        with translated(self._errors):
            promise = buffer.map_async(mode)
        return PythonMapped(buffer, promise, self._errors)

    def poll(self) -> None:
        """See `webgpu.OpenDevice`. wgpu-py's blocking poll waits for later steps, too."""
        self.wgpu._poll()

    def compile(self, label: str, code: str) -> Any:
        """See `webgpu.OpenDevice`."""
        with translated(self._errors):
            module = self._module(label, code)
            return self.wgpu.create_compute_pipeline(
                label=label, layout="auto", compute={"module": module, "entry_point": "main"}
            )

    def _module(self, label: str, code: str) -> Any:
        return self.wgpu.create_shader_module(label=label, code=code)

    def bind_group(self, pipeline: Any, ranges: Sequence[tuple[Buffer, int, int]]) -> Any:
        """See `webgpu.OpenDevice`."""
        with translated(self._errors):
            return self.wgpu.create_bind_group(
                layout=pipeline.get_bind_group_layout(0),
                entries=[
                    {"binding": i, "resource": {"buffer": buffer, "offset": offset, "size": size}}
                    for i, (buffer, offset, size) in enumerate(ranges)
                ],
            )

    def query_set(self, count: int) -> Any:
        """See `webgpu.OpenDevice`."""
        return self.wgpu.create_query_set(type="timestamp", count=count)

    def encoder(self) -> PythonEncoder:
        """See `webgpu.OpenDevice`."""
        with translated(self._errors):
            inner = self.wgpu.create_command_encoder()
        return PythonEncoder(inner, self._inner, self._errors)

    def submit(self, commands: Any) -> None:
        """See `webgpu.OpenDevice`."""
        with translated(self._errors):
            self._queue.submit([commands])

    def submit_timed(self, encoder: Encoder, queries: Any, count: int) -> list[int]:
        """See `webgpu.OpenDevice`.

        Dawn gives nanoseconds, wgpu ticks; one tick is one nanosecond on every device seen (NVIDIA,
        llvmpipe).
        """
        resolved = self.wgpu.create_buffer(size=8 * count, usage=self._stamps_usage)
        assert isinstance(encoder, PythonEncoder)
        encoder.inner.resolve_query_set(queries, 0, count, resolved, 0)
        self.submit(encoder.finish())
        ticks = np.frombuffer(self.read(resolved, 0, 8 * count), np.uint64)
        resolved.destroy()
        return [int(tick) for tick in ticks]

    def close(self) -> None:
        """See `webgpu.OpenDevice`."""
        self.wgpu.destroy()


class PythonEncoder:
    """See `webgpu.Encoder`."""

    def __init__(self, inner: Any, functions: Any, errors: tuple[type[Exception], ...]) -> None:
        self.inner = inner
        self._functions = functions
        self._errors = errors

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
        with translated(self._errors):
            compute_pass = self.inner.begin_compute_pass(**options)
            _encode_dispatches(self._functions, compute_pass, launches)
            compute_pass.end()

    def copy(
        self, source: Buffer, source_offset: int, target: Buffer, offset: int, n_bytes: int
    ) -> None:
        """See `webgpu.Encoder`."""
        with translated(self._errors):
            self.inner.copy_buffer_to_buffer(source, source_offset, target, offset, n_bytes)

    def clear(self, buffer: Buffer, offset: int, n_bytes: int) -> None:
        """See `webgpu.Encoder`."""
        with translated(self._errors):
            self.inner.clear_buffer(buffer, offset, n_bytes)

    def finish(self) -> Any:
        """See `webgpu.Encoder`."""
        with translated(self._errors):
            return self.inner.finish()


class PythonMapped:
    """See `webgpu.Mapped` and `webgpu.MappedSource`.

    Args:
        promise: the package's, of its `map_async`.
    """

    def __init__(self, buffer: Any, promise: Any, errors: tuple[type[Exception], ...]) -> None:
        self._buffer = buffer
        self._promise = promise
        self._errors = errors

    def arrived(self) -> bool:
        """See `webgpu.Mapped`."""
        return bool(self._promise._state != "pending")

    def take(self) -> bytes:
        """See `webgpu.Mapped`."""
        with translated(self._errors):
            self._promise.sync_wait()
            data = bytes(self._buffer.read_mapped(copy=False))
            self._buffer.unmap()
        return data

    def read_into(self, target: np.ndarray) -> None:
        """See `webgpu.Mapped`. numpy copies without Python's lock."""
        with translated(self._errors):
            self._promise.sync_wait()
            target[:] = np.frombuffer(self._buffer.read_mapped(copy=False), np.uint8)
            self._buffer.unmap()

    def write(self, data: np.ndarray) -> None:
        """See `webgpu.MappedSource`."""
        with translated(self._errors):
            self._promise.sync_wait()
            self._buffer.write_mapped(data)
            self._buffer.unmap()


def _encode_dispatches(functions: Any, compute_pass: Any, launches: Iterable[Launch]) -> None:
    """Appends launches to a pass.

    As the pass's own methods do, but without what these do around each of three calls (wgpu-py: an
    error scope): a step has a thousand dispatches. What is wrong shows when the encoder finishes.
    """
    lib, no_offsets = functions.lib, functions.ffi.NULL
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
