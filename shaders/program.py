"""A step as a program: dispatches recorded once, replayed every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

import numpy as np
import wgpu

from lora.shaders.device import Device
from lora.shaders.errors import LoraError
from lora.shaders.native import encode_dispatches, map_for_reading
from lora.shaders.tensor import Tensor

# A submission that runs for some seconds is killed by the watchdogs of desktop drivers. This is
# half a second on an integrated GPU of 0.2 TFLOP/s; a large GPU hardly notices the few more.
MAX_SUBMISSION_FLOPS = 10**11
# A GPU begins with the first submission while the host still encodes the next; fewer dispatches to
# a submission cost the host more than the device gains (benchmarks/submissions.py, docs/log.md).
MAX_SUBMISSION_DISPATCHES = 128
MAX_WORKGROUPS = 65_535  # of one dimension of a dispatch, by WebGPU's default limits
_POLL_SECONDS = 0.0001
RESULT_DEADLINE = 3600.0  # seconds; a step of 8 B takes minutes where a CPU computes it
_QUERIES = 4096  # timestamps in one query set, WebGPU's largest


@dataclass(frozen=True)
class Dispatch:
    """One kernel launch: plain data, ready to be encoded.

    Attributes:
        label: what listings call it.
        template: name of the WGSL template, without its ending.
        constants: what the template was rendered with.
        pipeline, bind_group: both made for the device.
        workgroups: the grid (x, y, z).
        flops: floating-point operations at full extent; a multiply-add counts two.
        tensors: as bound to @group(0), in the order of their @binding numbers.
    """

    label: str
    template: str
    constants: Mapping[str, Any]
    pipeline: wgpu.GPUComputePipeline
    bind_group: wgpu.GPUBindGroup
    workgroups: tuple[int, int, int]
    flops: int
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Copy:
    """A copy between device buffers, or (source None) a fill with zeros."""

    label: str
    source: Tensor | None
    destination: Tensor


@dataclass(frozen=True)
class KernelTime:
    """What one dispatch took on the device."""

    label: str
    template: str
    seconds: float
    flops: int


def fold(n_workgroups: int) -> tuple[int, int, int]:
    """A one-dimensional grid folded into x and y.

    Kernels launched so find their place as `group.x + group.y * groups.x` (builtins workgroup_id
    and num_workgroups) and return when it is past the end: the fold may launch a few too many.
    """
    if n_workgroups <= MAX_WORKGROUPS:
        return max(1, n_workgroups), 1, 1
    y = -(-n_workgroups // MAX_WORKGROUPS)
    return -(-n_workgroups // y), y, 1


class Program:
    """A list of dispatches and copies, built once and replayed.

    `forward/`, `backward/` and `optim/` append to it; nothing runs until `run`. Bind groups are
    made while recording, so that a replay allocates nothing.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.commands: list[Dispatch | Copy] = []
        self._scope: list[str] = []

    # -- recording ------------------------------------------------------------------------------

    def scope(self, name: str) -> _Scope:
        """A context manager that puts `name.` before the labels recorded inside it."""
        return _Scope(self, name)

    def dispatch(
        self,
        template: str,
        constants: dict[str, Any],
        tensors: Sequence[Tensor],
        workgroups: int | tuple[int, int, int],
        *,
        label: str = "",
        flops: int = 0,
    ) -> None:
        """Appends one kernel launch.

        Args:
            template: name of the WGSL template, without its ending.
            constants: what the template needs to be rendered.
            tensors: bound to @group(0) in the order of their @binding numbers.
            workgroups: grid (x, y, z), or a number of workgroups that `fold` lays out.
            label: what it is called in listings; the template's name by default.
            flops: floating-point operations of one launch at full extent.
        """
        grid = fold(workgroups) if isinstance(workgroups, int) else workgroups
        if max(grid) > MAX_WORKGROUPS:
            raise ValueError(f"{template}: a grid of {grid} passes {MAX_WORKGROUPS} workgroups")
        for tensor in tensors:
            if tensor.n_bytes > self.device.max_binding:
                raise ValueError(
                    f"{template}: {tensor.shape} ({tensor.n_bytes} bytes) is larger than the "
                    f"device's largest binding, {self.device.max_binding}"
                )
        pipeline = self.device.pipeline(template, constants)
        bind_group = self.device.bind_group(pipeline, tensors)
        name = ".".join([*self._scope, label or template])
        self.commands.append(
            Dispatch(
                name, template, dict(constants), pipeline, bind_group, grid, flops, tuple(tensors)
            )
        )  # fmt: skip

    def copy(self, source: Tensor, destination: Tensor, *, label: str = "copy") -> None:
        """Appends a copy of a whole tensor."""
        if source.n_bytes != destination.n_bytes:
            raise ValueError(f"cannot copy {source.shape} into {destination.shape}")
        self.commands.append(Copy(".".join([*self._scope, label]), source, destination))

    def clear(self, tensor: Tensor, *, label: str = "clear") -> None:
        """Appends a fill with zeros."""
        self.commands.append(Copy(".".join([*self._scope, label]), None, tensor))

    # -- running --------------------------------------------------------------------------------

    def run(self) -> None:
        """Encodes and submits the program, in one or several pieces; does not wait for it."""
        for commands in self._pieces():
            encoder = self.device.wgpu.create_command_encoder()
            _encode(encoder, commands)
            self.device.queue.submit([encoder.finish()])

    def encode(self, encoder: wgpu.GPUCommandEncoder) -> None:
        """Appends the whole program to a command encoder."""
        _encode(encoder, self.commands)

    def _pieces(self) -> list[list[Dispatch | Copy]]:
        """The commands in submissions: none takes too long, and the first is there soon.

        Drivers of desktops kill what takes long. A copy goes with the dispatch before it.
        """
        pieces: list[list[Dispatch | Copy]] = [[]]
        flops = dispatches = 0
        for command in self.commands:
            if isinstance(command, Dispatch):
                if flops > MAX_SUBMISSION_FLOPS or dispatches == MAX_SUBMISSION_DISPATCHES:
                    pieces.append([])
                    flops = dispatches = 0
                flops += command.flops
                dispatches += 1
            pieces[-1].append(command)
        return pieces

    def time(self) -> list[KernelTime]:
        """Runs the program with a timestamp before and after every dispatch; waits for it.

        Needs the feature timestamp-query. Every dispatch gets a pass of its own, so that the sum
        lies somewhat above the time of `run`.
        """
        times: list[KernelTime] = []
        stretch = _QUERIES // 2  # commands of which each may need two timestamps
        for start in range(0, len(self.commands), stretch):
            times += self._time_some(self.commands[start : start + stretch])
        return times

    def _time_some(self, commands: Sequence[Dispatch | Copy]) -> list[KernelTime]:
        dispatches = [c for c in commands if isinstance(c, Dispatch)]
        encoder = self.device.wgpu.create_command_encoder()
        if not dispatches:  # a query set may not be empty, nor resolved where nothing was written
            for command in commands:
                if isinstance(command, Copy):
                    _encode_copy(encoder, command)
            self.device.queue.submit([encoder.finish()])
            return []
        count = 2 * len(dispatches)
        queries = self.device.wgpu.create_query_set(type="timestamp", count=count)
        resolved = self.device.wgpu.create_buffer(
            size=8 * count,
            usage=wgpu.BufferUsage.QUERY_RESOLVE | wgpu.BufferUsage.COPY_SRC,
        )
        index = 0
        for command in commands:
            if isinstance(command, Copy):
                _encode_copy(encoder, command)
                continue
            compute_pass = encoder.begin_compute_pass(
                timestamp_writes={
                    "query_set": queries,
                    "beginning_of_pass_write_index": 2 * index,
                    "end_of_pass_write_index": 2 * index + 1,
                }
            )
            compute_pass.set_pipeline(command.pipeline)
            compute_pass.set_bind_group(0, command.bind_group)
            compute_pass.dispatch_workgroups(*command.workgroups)
            compute_pass.end()
            index += 1
        encoder.resolve_query_set(queries, 0, count, resolved, 0)
        self.device.queue.submit([encoder.finish()])
        stamps = np.frombuffer(self.device.queue.read_buffer(resolved), np.uint64).reshape(-1, 2)
        # wgpu gives ticks; one tick is one nanosecond on every device seen (NVIDIA, llvmpipe).
        return [
            KernelTime(d.label, d.template, float(end - begin) * 1e-9, d.flops)
            for d, (begin, end) in zip(dispatches, stamps, strict=True)
        ]


class _Scope:
    def __init__(self, program: Program, name: str) -> None:
        self._program = program
        self._name = name

    def __enter__(self) -> None:
        self._program._scope.append(self._name)

    def __exit__(self, *_: object) -> None:
        self._program._scope.pop()


def _encode(encoder: wgpu.GPUCommandEncoder, commands: Sequence[Dispatch | Copy]) -> None:
    """Appends commands to an encoder; dispatches between two copies share a pass."""
    start = 0
    while start < len(commands):
        command = commands[start]
        if isinstance(command, Copy):
            _encode_copy(encoder, command)
            start += 1
            continue
        stretch = list(takewhile(lambda c: isinstance(c, Dispatch), islice(commands, start, None)))
        compute_pass = encoder.begin_compute_pass()
        encode_dispatches(
            compute_pass,
            ((c.pipeline, c.bind_group, c.workgroups) for c in stretch if isinstance(c, Dispatch)),
        )
        compute_pass.end()
        start += len(stretch)


def _encode_copy(encoder: wgpu.GPUCommandEncoder, command: Copy) -> None:
    to = command.destination
    if command.source is None:
        encoder.clear_buffer(to.buffer, to.offset, to.n_bytes)
    else:
        source = command.source
        encoder.copy_buffer_to_buffer(
            source.buffer, source.offset, to.buffer, to.offset, to.n_bytes
        )


class ReadbackRing:
    """Small results read back a few steps late, so that no step waits for the device.

    Each `push` copies a tensor into a free staging buffer and asks for it to be mapped; `ready`
    hands out those that have arrived, in order. A push waits only when every slot is in flight.

    Args:
        device: that computes the results.
        n_bytes: of each of them.
        slots: results that can be under way.
        deadline: seconds that a result may take once it is waited for.
    """

    def __init__(
        self, device: Device, n_bytes: int, slots: int = 8, deadline: float = RESULT_DEADLINE
    ) -> None:
        self._device = device
        self._deadline = deadline
        usage = wgpu.BufferUsage.MAP_READ | wgpu.BufferUsage.COPY_DST
        self._free = [device.wgpu.create_buffer(size=n_bytes, usage=usage) for _ in range(slots)]
        self._n_bytes = n_bytes
        self._in_flight: list[tuple[wgpu.GPUBuffer, Any, Callable[[np.ndarray], Any]]] = []
        self._arrived: list[Any] = []

    def push(self, tensor: Tensor, convert: Callable[[np.ndarray], Any]) -> None:
        """Reads `tensor` as it is after the work submitted so far; `convert` gets its f32s."""
        if tensor.n_bytes != self._n_bytes:
            raise ValueError(f"{tensor.shape} does not fit a ring of {self._n_bytes} bytes")
        if not self._free:
            self._take_first(wait=True)
        buffer = self._free.pop()
        encoder = self._device.wgpu.create_command_encoder()
        encoder.copy_buffer_to_buffer(tensor.buffer, tensor.offset, buffer, 0, self._n_bytes)
        self._device.queue.submit([encoder.finish()])
        self._in_flight.append((buffer, map_for_reading(buffer), convert))

    def _take_first(self, *, wait: bool) -> bool:
        buffer, promise, convert = self._in_flight[0]
        # Polling without blocking: a blocking poll, and sync_wait, wait for all that was submitted,
        # later steps included.
        self._device.wgpu._poll()
        latest = time.monotonic() + self._deadline
        while wait and promise._state == "pending":
            if time.monotonic() > latest:
                raise LoraError(
                    f"{self._device.name} has not given a result for {self._deadline:,.0f} s: its "
                    "driver hangs, or one step takes longer than that. Lower train.batch_size or "
                    "data.max_length, or restart the driver."
                )
            time.sleep(_POLL_SECONDS)
            self._device.wgpu._poll()
        if promise._state == "pending":
            return False
        promise.sync_wait()
        self._in_flight.pop(0)
        values = np.frombuffer(buffer.read_mapped(), np.float32).copy()
        buffer.unmap()
        self._free.append(buffer)
        self._arrived.append(convert(values))
        return True

    def take(self) -> Any:
        """The first that has not been handed out; waits for it."""
        if not self._arrived:
            self._take_first(wait=True)
        return self._arrived.pop(0)

    def ready(self, *, wait: bool = False) -> list[Any]:
        """What has arrived since the last call, in order; with `wait`, all that was pushed."""
        while self._in_flight and self._take_first(wait=wait):
            pass
        arrived, self._arrived = self._arrived, []
        return arrived
