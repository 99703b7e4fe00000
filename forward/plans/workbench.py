"""Timing of products under one plan or another, on the device, beside what it holds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import wgpu

from lora.forward.plans.matmul_plans import Request, use_source
from lora.forward.plans.matmul_tiles import Plan
from lora.forward.plans.stretches import ProductNorm
from lora.shaders.device import Device
from lora.shaders.errors import InputError
from lora.shaders.native import encode_dispatches
from lora.shaders.planning import PlanningDevice
from lora.shaders.program import MAX_SUBMISSION_FLOPS, Dispatch, Program
from lora.shaders.tensor import Extent, Tensor

_MOST_REPEATS = 16  # of a program in one pass
_PATTERN_BYTES = 4 << 20  # of ordinary numbers, copied into every stand-in

Kernels = list[tuple[str, dict[str, Any]]]  # templates and their constants


class Stopwatch:
    """Seconds of programs that are dispatches only: one pass each, as in a step.

    With the feature timestamp-query a pass has a timestamp before and after it; elsewhere the host
    waits for it, so that a time holds the wait too and must be long to mean something.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._stamps = "timestamp-query" in device.features
        self._waited_for = device.uniform().buffer
        self._shortest = 150e-6 if self._stamps else 10e-3  # seconds that a pass should take

    def repeats(self, once: float) -> int:
        """How often to run what takes `once` seconds for a pass that is long enough."""
        return max(1, min(_MOST_REPEATS, round(self._shortest / max(once, 1e-9))))

    def __call__(self, programs: Sequence[Program], repeats: int) -> list[float]:
        """Seconds of each program, run `repeats` times in a row, per time."""
        if not self._stamps:
            return [self._wait_for(program, repeats) / repeats for program in programs]
        seconds: list[float] = []
        for stretch in _submissions(programs, repeats):
            seconds += self._between_stamps(stretch, repeats)
        return [value / repeats for value in seconds]

    def _encode(
        self, encoder: wgpu.GPUCommandEncoder, program: Program, repeats: int, **options: Any
    ) -> None:
        dispatches = [c for c in program.commands if isinstance(c, Dispatch)]
        compute_pass = encoder.begin_compute_pass(**options)
        commands = itertools.chain.from_iterable(itertools.repeat(dispatches, repeats))
        encode_dispatches(
            compute_pass, ((c.pipeline, c.bind_group, c.workgroups) for c in commands)
        )
        compute_pass.end()

    def _between_stamps(self, programs: Sequence[Program], repeats: int) -> list[float]:
        device, count = self._device.wgpu, 2 * len(programs)
        queries = device.create_query_set(type="timestamp", count=count)
        usage = wgpu.BufferUsage.QUERY_RESOLVE | wgpu.BufferUsage.COPY_SRC
        resolved = device.create_buffer(size=8 * count, usage=usage)
        encoder = device.create_command_encoder()
        for index, program in enumerate(programs):
            stamps = {
                "query_set": queries,
                "beginning_of_pass_write_index": 2 * index,
                "end_of_pass_write_index": 2 * index + 1,
            }
            self._encode(encoder, program, repeats, timestamp_writes=stamps)
        encoder.resolve_query_set(queries, 0, count, resolved, 0)
        self._device.queue.submit([encoder.finish()])
        ticks = np.frombuffer(self._device.queue.read_buffer(resolved), np.uint64).reshape(-1, 2)
        return [float(end - begin) * 1e-9 for begin, end in ticks]

    def _wait_for(self, program: Program, repeats: int) -> float:
        encoder = self._device.wgpu.create_command_encoder()
        self._encode(encoder, program, repeats)
        commands = encoder.finish()
        self._device.queue.read_buffer(self._waited_for)  # nothing else is under way
        began = time.perf_counter()
        self._device.queue.submit([commands])
        self._device.queue.read_buffer(self._waited_for)
        return time.perf_counter() - began


def _submissions(programs: Sequence[Program], repeats: int) -> Iterator[list[Program]]:
    """The programs in stretches that no driver's watchdog kills."""
    stretch: list[Program] = []
    flops = 0
    for program in programs:
        flops += repeats * sum(c.flops for c in program.commands if isinstance(c, Dispatch))
        if stretch and flops > MAX_SUBMISSION_FLOPS:
            yield stretch
            stretch, flops = [], 0
        stretch.append(program)
    if stretch:
        yield stretch


class Workbench(Device):
    """A device with memory of its own, given back on `close`, for programs that are only timed.

    Kernels that it compiles belong to the device that it works on, for training to find them.
    """

    def __init__(self, device: Device) -> None:
        self.copy_limits(device)
        self.memory_limit = device.memory_limit
        self.wgpu, self.queue = device.wgpu, device.queue
        self._pipelines = device._pipelines
        self._created: list[wgpu.GPUBuffer] = []
        self._pattern = self.empty((_PATTERN_BYTES // 4,), "u32")
        words = np.random.default_rng(0).integers(0, 2**32, self._pattern.shape, np.uint32)
        # Without the upper bit of their exponents neither f32 nor f16 are infinite or NaN.
        self.write(self._pattern, words & np.uint32(0xBFFFBFFF))

    def _create(
        self, shape: tuple[int, ...], dtype: str, purpose: str, extent: Extent | None
    ) -> Tensor:
        tensor = super()._create(shape, dtype, purpose, extent)
        self._created.append(tensor.buffer)
        return tensor

    def program(self, request: Request, plan: Plan, stand_ins: dict[int, Tensor]) -> Program:
        """The product under a plan, on tensors like the request's, filled with ordinary numbers.

        Args:
            stand_ins: those made for the same request before, by the id of what they stand for.
        """
        extent_key = id(request.extent.uniform)
        if extent_key not in stand_ins:
            stand_ins[extent_key] = self.extent(request.extent.maximum).uniform
        extent = Extent(request.extent.maximum, stand_ins[extent_key])

        def stand_in(tensor: Tensor) -> Tensor:
            if id(tensor) not in stand_ins:
                stand_ins[id(tensor)] = self._filled(tensor, extent)
            return stand_ins[id(tensor)]

        program = Program(self)
        self.precision = "f16" if request.half else "f32"
        use_source(self, lambda _: plan)
        request.record(
            program,
            extent,
            stand_in(request.out),
            dict(request.constants),
            [stand_in(tensor) for tensor in request.tensors],
            [stand_in(tensor) for tensor in request.after],
            request.place,
            f"{request.label} {plan.name}",
            request.flops,
            _on(stand_in, request.norm),
        )
        return program

    def _filled(self, like: Tensor, extent: Extent) -> Tensor:
        tensor = self.empty(like.shape, like.dtype, extent=extent if like.extent else None)
        encoder = self.wgpu.create_command_encoder()
        for start in range(0, tensor.n_bytes, _PATTERN_BYTES):
            count = min(_PATTERN_BYTES, tensor.n_bytes - start)
            encoder.copy_buffer_to_buffer(self._pattern.buffer, 0, tensor.buffer, start, count)
        self.queue.submit([encoder.finish()])
        return tensor

    def close(self) -> None:
        """Gives the memory back."""
        for buffer in self._created:
            buffer.destroy()
        self._created.clear()


def _on(stand_in: Callable[[Tensor], Tensor], norm: Any) -> ProductNorm | None:
    """A norm on other tensors."""
    if norm is None:
        return None
    held = {field.name: getattr(norm, field.name) for field in fields(norm)}
    changed = {name: stand_in(value) for name, value in held.items() if isinstance(value, Tensor)}
    return replace(norm, **changed)


class KernelList(PlanningDevice):
    """A planning device that notes what would be compiled."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.kernels: Kernels = []

    def pipeline(self, template: str, constants: dict[str, Any]) -> Any:
        """Only noted."""
        self.kernels.append((template, constants))
        return None


def kernels_of(device: Device, request: Request, plan: Plan) -> Kernels:
    """What a plan needs compiled."""
    planning = KernelList(device)
    planning.precision = "f16" if request.half else "f32"
    use_source(planning, lambda _: plan)
    request.record(
        Program(planning),
        request.extent,
        request.out,
        dict(request.constants),
        request.tensors,
        request.after,
        request.place,
        request.label,
        request.flops,
        request.norm,
    )
    return planning.kernels


def fits(device: Device, request: Request, plan: Plan) -> bool:
    """Whether the device can bind what a plan needs."""
    try:
        kernels_of(device, request, plan)
    except (InputError, ValueError):
        return False
    return True
