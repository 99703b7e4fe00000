"""Timing of products under one plan or another, on the device, beside what it holds."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np

from lora.forward.plans.matmul_plans import Request
from lora.forward.plans.matmul_tiles import Plan
from lora.shaders.device import Device
from lora.shaders.errors import InputError
from lora.shaders.facts import DeviceFacts
from lora.shaders.memory import CountingMemory, Memory
from lora.shaders.program import Dispatch, Program
from lora.shaders.recording import MAX_SUBMISSION_FLOPS, Recording
from lora.shaders.tensor import Extent, Tensor
from lora.shaders.webgpu import Launch

_MOST_REPEATS = 64  # of a program in one pass
_MOST_LONG_REPEATS = 500
_UNIFORM = re.compile(r"@binding\((\d+)\) var<uniform>")
_PATTERN_BYTES = 4 << 20  # of ordinary numbers, copied into every stand-in

Kernels = list[tuple[str, dict[str, Any]]]  # templates and their constants


class Stopwatch:
    """Seconds of programs that are dispatches only: one pass each, as in a step.

    With the feature timestamp-query a pass has a timestamp before and after it; elsewhere the host
    waits for it, so that a time holds the wait too and must be long to mean something.

    Args:
        shortest: seconds that a pass should take, however many repeats that are; None for what
            tells plans apart quickly. A GPU that mostly waits for passes lowers its clock.
    """

    def __init__(self, device: Device, shortest: float | None = None) -> None:
        self._handle = device.handle
        self._stamps = "timestamp-query" in device.facts.features
        self._most = _MOST_REPEATS if shortest is None else _MOST_LONG_REPEATS
        self._shortest = shortest or (600e-6 if self._stamps else 10e-3)

    def repeats(self, once: float) -> int:
        """How often to run what takes `once` seconds for a pass that is long enough."""
        return max(1, min(self._most, round(self._shortest / max(once, 1e-9))))

    def __call__(self, programs: Sequence[Program], repeats: int) -> list[float]:
        """Seconds of each program, run `repeats` times in a row, per time."""
        if not self._stamps:
            return [self._wait_for(program, repeats) / repeats for program in programs]
        seconds: list[float] = []
        for stretch in _submissions(programs, repeats):
            seconds += self._between_stamps(stretch, repeats)
        return [value / repeats for value in seconds]

    def _between_stamps(self, programs: Sequence[Program], repeats: int) -> list[float]:
        count = 2 * len(programs)
        queries, encoder = self._handle.query_set(count), self._handle.encoder()
        for index, program in enumerate(programs):
            encoder.dispatches(_launches(program, repeats), (queries, 2 * index, 2 * index + 1))
        stamps = iter(self._handle.submit_timed(encoder, queries, count))
        return [1e-9 * (end - begin) for begin, end in zip(stamps, stamps, strict=True)]

    def _wait_for(self, program: Program, repeats: int) -> float:
        encoder = self._handle.encoder()
        encoder.dispatches(_launches(program, repeats))
        commands = encoder.finish()
        waited_for = program.dispatches[0].tensors[0].buffer
        self._handle.read(waited_for, 0, 4)  # nothing else is under way
        began = time.perf_counter()
        self._handle.submit(commands)
        self._handle.read(waited_for, 0, 4)
        return time.perf_counter() - began


def _launches(program: Program, repeats: int) -> Iterator[Launch]:
    return itertools.chain.from_iterable(
        itertools.repeat([dispatch.launch for dispatch in program.dispatches], repeats)
    )


def _submissions(programs: Sequence[Program], repeats: int) -> Iterator[list[Program]]:
    """The programs in stretches that no driver's watchdog kills."""
    stretch: list[Program] = []
    flops = 0
    for program in programs:
        flops += repeats * sum(dispatch.flops for dispatch in program.dispatches)
        if stretch and flops > MAX_SUBMISSION_FLOPS:
            yield stretch
            stretch, flops = [], 0
        stretch.append(program)
    if stretch:
        yield stretch


class Workbench:
    """Products recorded in memory of their own, given back on `close`, only to be timed.

    Kernels that it compiles belong to the device, for training to find them.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory = device.arena()
        self._pattern = self._memory.empty((_PATTERN_BYTES // 4,), "u32")
        words = np.random.default_rng(0).integers(0, 2**32, self._pattern.shape, np.uint32)
        # Without the upper bit of their exponents neither f32 nor f16 are infinite or NaN.
        self._memory.write(self._pattern, words & np.uint32(0xBFFFBFFF))

    def program(self, request: Request, plan: Plan, stand_ins: dict[int, Tensor]) -> Program:
        """The product under a plan, on tensors like the request's, filled with ordinary numbers.

        Args:
            stand_ins: those made for the same request before, by the id of what they stand for.
        """
        extent_key = id(request.extent.uniform)
        if extent_key not in stand_ins:
            stand_ins[extent_key] = self._memory.extent(request.extent.maximum).uniform
        extent = Extent(request.extent.maximum, stand_ins[extent_key])

        def stand_in(tensor: Tensor) -> Tensor:
            if id(tensor) not in stand_ins:
                stand_ins[id(tensor)] = self._filled(tensor, extent)
            return stand_ins[id(tensor)]

        program = Program(_recording(self._device.facts, self._memory, request, plan))
        request.record(
            program,
            replace(
                request,
                extent=extent,
                out=stand_in(request.out),
                tensors=[stand_in(tensor) for tensor in request.tensors],
                after=[stand_in(tensor) for tensor in request.after],
                largest=None if request.largest is None else self._ones(request.largest),
                dropout=request.dropout
                and replace(
                    request.dropout,
                    rows=stand_in(request.dropout.rows),
                    matrices=self._memory.uniform(),
                ),
                label=f"{request.label} {plan.name}",
                then=_on(stand_in, request.then),
            ),
        )
        return program

    def again(self, dispatch: Dispatch, rows: int) -> Program:
        """A dispatch of a product, recorded anywhere, on tensors like its own.

        Args:
            rows: in use of those that it was recorded for.
        """
        uniforms = {int(number) for number in _UNIFORM.findall(dispatch.code)}
        extent = Extent(rows, self._memory.uniform())
        self._memory.set_rows(extent, rows)
        tensors = [
            (extent.uniform if number == 0 else self._memory.uniform())
            if number in uniforms
            else self._filled(like, extent)
            for number, like in enumerate(dispatch.tensors)
        ]
        program = Program(Recording(self._device.facts, self._memory))
        program.dispatch(
            dispatch.template, dict(dispatch.constants), tensors, dispatch.workgroups,
            flops=dispatch.flops,
        )  # fmt: skip
        return program

    def _ones(self, like: Tensor) -> Tensor:
        """1, as f32's bits: about the largest weight of words that are random."""
        return self._memory.upload(np.full(like.shape, 0x3F800000, np.uint32))

    def _filled(self, like: Tensor, extent: Extent) -> Tensor:
        extent_of_it = extent if like.extent else None
        tensor = self._memory.empty(like.shape, like.dtype, extent=extent_of_it)
        encoder = self._memory.handle.encoder()
        for start in range(0, tensor.n_bytes, _PATTERN_BYTES):
            count = min(_PATTERN_BYTES, tensor.n_bytes - start)
            encoder.copy(self._pattern.buffer, 0, tensor.buffer, start, count)
        self._memory.handle.submit(encoder.finish())
        return tensor

    def close(self) -> None:
        """Gives the memory back."""
        self._memory.close()

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _recording(facts: DeviceFacts, memory: Memory, request: Request, plan: Plan) -> Recording:
    """As a request was recorded, but under a plan."""
    precision = "f16" if request.half else "f32"
    return Recording(facts, memory, precision, plans=lambda _: plan)


def _on(stand_in: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A value on other tensors, however deep in it they are."""
    if isinstance(value, Tensor):
        return stand_in(value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    held = {field.name: getattr(value, field.name) for field in fields(value)}
    return replace(value, **{name: _on(stand_in, held[name]) for name in held})


def kernels_of(facts: DeviceFacts, request: Request, plan: Plan) -> Kernels:
    """What a plan needs compiled."""
    program = Program(_recording(facts, CountingMemory(facts), request, plan))
    request.record(program, request)
    return [(dispatch.template, dict(dispatch.constants)) for dispatch in program.dispatches]


def fits(facts: DeviceFacts, request: Request, plan: Plan) -> bool:
    """Whether a device can bind what a plan needs."""
    try:
        kernels_of(facts, request, plan)
    except (InputError, ValueError):
        return False
    return True
