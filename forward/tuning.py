"""Which plan of matmul_tiled a device records with, and the timing of candidates on the device.

Wherever a program records a product, `plan_of` asks what was attached to its device: plans found by
`tune`, now or in an earlier run, or (the rule where nothing is attached) the model of
forward/matmul_tiles.py. A plan decides in which order sums are taken, so the last bits of results
depend on it: who tunes keeps what was found (lora/tile_cache.py).
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import wgpu

from forward.matmul_tiles import (
    MOST_CANDIDATES,
    Plan,
    candidates,
    choose_tile,
    predicted_microseconds,
)
from forward.rmsnorm import ProductNorm
from shaders.device import Device
from shaders.errors import DeviceMemoryError, InputError
from shaders.native import encode_dispatches
from shaders.planning import PlanningDevice
from shaders.program import MAX_SUBMISSION_FLOPS, Dispatch, Program
from shaders.tensor import Extent, Tensor

TUNING_SECONDS = 2.0  # that the first start of a training may take longer
_COMPILING_SHARE = 0.6  # of them, for kernels that training might not need
_COMPILING_THREADS = 8
_WARM_UP_SECONDS = 0.1  # an idle GPU clocks low, and takes a while to speed up
_ROUNDS = 5  # times that every candidate is timed
_FEWEST_ROUNDS = 3  # fewer decide nothing
_MARGIN = 0.03  # by which another plan must be faster than the model's
_MOST_REPEATS = 16
_ROW_STEP = 32  # rows of the smallest tile: between its multiples no tile's grid changes
_PATTERN_BYTES = 4 << 20

Kernels = list[tuple[str, dict[str, Any]]]  # templates and their constants


@dataclass(frozen=True)
class Product:
    """What decides which plan is the fastest for a product.

    Attributes:
        rows: the most that the output can have, rounded up to whole smallest tiles.
        members: adapted ranges of the part.
        half: whether the tiles are of f16.
        normed: whether a norm follows, which may add stretches up.
    """

    rows: int
    columns: int
    contraction: int
    quantization: str
    transposed: bool
    members: int
    rank: int
    placed: bool
    epilogue: str
    x_type: str
    out_type: str
    half: bool
    normed: bool

    @property
    def key(self) -> str:
        """Its name in files."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class Request:
    """A product that is being recorded: what `record` needs to record it again elsewhere.

    Attributes:
        record: called as record(program, extent, out, constants, tensors, after, place, label,
            flops, norm); forward/matmul.py's own.
        half: whether it is recorded under `precision: f16`.
    """

    record: Callable[..., None]
    half: bool
    extent: Extent
    out: Tensor
    constants: Mapping[str, Any]
    tensors: Sequence[Tensor]
    after: Sequence[Tensor]
    place: Any
    label: str
    flops: int
    norm: ProductNorm | None

    @property
    def product(self) -> Product:
        """What decides the plan."""
        c = self.constants
        return Product(
            rows=-(-self.extent.maximum // _ROW_STEP) * _ROW_STEP,
            columns=c["n_columns"],
            contraction=c["contraction"],
            quantization=c["quantization"],
            transposed=c["transposed"],
            members=len(c["members"]),
            rank=c["rank"] if c["members"] else 0,
            placed=c["placed"],
            epilogue=c["epilogue"],
            x_type=c["x_type"],
            out_type=c["out_type"],
            half=self.half,
            normed=self.norm is not None,
        )

    def shape(self, device: Device) -> tuple[int, int, int, int, bool]:
        """The arguments of `choose_tile`."""
        c = self.constants
        limit = device.workgroup_memory
        return self.extent.maximum, c["n_columns"], c["contraction"], limit, self.half


# -- what a device records with --------------------------------------------------------------------

PlanSource = Callable[[Request], Plan | None]

_sources: WeakKeyDictionary[Device, PlanSource] = WeakKeyDictionary()
_listeners: WeakKeyDictionary[Device, list[Request]] = WeakKeyDictionary()


def plan_of(device: Device, request: Request) -> Plan:
    """The plan of a product: what was attached to the device has the first word, then the model."""
    if device in _listeners:
        _listeners[device].append(request)
    source = _sources.get(device)
    plan = None if source is None else source(request)
    return plan or choose_tile(*request.shape(device))


def use_source(device: Device, source: PlanSource | None) -> None:
    """Lets a device record with a source's plans from now on; None for the model's alone."""
    if source is None:
        _sources.pop(device, None)
    else:
        _sources[device] = source


@contextmanager
def using_source(device: Device, source: PlanSource | None) -> Iterator[None]:
    """Lets a device record with a source's plans in the block only."""
    before = _sources.get(device)
    use_source(device, source)
    try:
        yield
    finally:
        use_source(device, before)


def use_plans(device: Device, plans: Mapping[Product, Plan]) -> None:
    """Lets a device record with these plans, and with the model's for products not among them."""
    use_source(device, lambda request: plans.get(request.product))


@contextmanager
def requests_of(device: Device) -> Iterator[list[Request]]:
    """Collects the requests of what is recorded on a device in the block."""
    requests: list[Request] = []
    _listeners[device] = requests
    try:
        yield requests
    finally:
        del _listeners[device]


# -- timing ----------------------------------------------------------------------------------------


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


class _KernelList(PlanningDevice):
    """Notes what would be compiled."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.kernels: Kernels = []

    def pipeline(self, template: str, constants: dict[str, Any]) -> Any:
        self.kernels.append((template, constants))
        return None


def kernels_of(device: Device, request: Request, plan: Plan) -> Kernels:
    """What a plan needs compiled."""
    planning = _KernelList(device)
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


# -- tuning ----------------------------------------------------------------------------------------


def tune(
    device: Device,
    requests: Iterable[Request],
    *,
    seconds: float = TUNING_SECONDS,
    stopwatch: Stopwatch | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Product, Plan]:
    """Times the best few plans of each product, with the real kernels, and takes the fastest.

    What takes the largest share of a step by the model goes first. The model's choice stays where
    no other is 3% faster, and where time was too short to say. The time is bounded: `seconds`
    (and what one timing takes), beside the compilation of kernels that the model chose, which
    would be needed anyway. Losing kernels are compiled by several threads for 60% of it.

    Args:
        device: no CPU adapter: those compile tiled kernels for seconds each.
        requests: the products of a training step, each as often as it occurs.
        seconds: to spend.
        stopwatch: what times programs.
        clock: seconds that pass.

    Returns:
        A plan for every product of the requests.
    """
    first: dict[Product, Request] = {}
    share: Counter[Product] = Counter()
    for request in requests:
        product = request.product
        first.setdefault(product, request)
        rows, columns, *_ = shape = request.shape(device)
        share[product] += round(1e3 * predicted_microseconds(choose_tile(*shape), rows, columns))
    heaviest_first = [product for product, _ in share.most_common()]
    plans = {}
    for product in heaviest_first:
        request = first[product]
        model, *others = candidates(*request.shape(device))
        plans[product] = [model, *(plan for plan in others if fits(device, request, plan))]
    compiled = _compile(device, first, plans, _COMPILING_SHARE * seconds, clock)
    chosen = {product: plans[product][0] for product in heaviest_first}
    # What compiling took for the model's choices is not counted.
    end = clock() + seconds - compiled.seconds
    watch = stopwatch if stopwatch is not None else Stopwatch(device)
    left = share.total()
    warm = False
    for product in heaviest_first:
        if len(compiled.plans[product]) > 1 and clock() < end:
            until = clock() + (end - clock()) * share[product] / left
            with suppress(DeviceMemoryError):  # no room to time it beside what the device holds
                chosen[product] = _fastest_of(
                    device, first[product], compiled.plans[product], watch, clock, until, warm
                )
            warm = True
        left -= share[product]
    return chosen


@dataclass(frozen=True)
class _Compiled:
    plans: dict[Product, list[Plan]]
    seconds: float  # what the plans after the first took


def _compile(
    device: Device,
    requests: Mapping[Product, Request],
    plans: Mapping[Product, Sequence[Plan]],
    seconds: float,
    clock: Callable[[], float],
) -> _Compiled:
    """Compiles the first plan of every product, then second ones, third ones, while there is time.

    Returns:
        The plans whose kernels are there, in order.
    """

    def compile_kernels(kernels: Kernels, deadline: float | None) -> bool:
        if deadline is not None and clock() >= deadline:
            return False
        try:
            for template, constants in kernels:
                device.pipeline(template, constants)
        except wgpu.GPUError:
            if deadline is None:
                raise
            return False  # a candidate that a driver cannot compile is none
        return True

    done: dict[Product, list[Plan]] = {product: [] for product in plans}
    with ThreadPoolExecutor(min(_COMPILING_THREADS, os.cpu_count() or 1)) as pool:

        def compile_rank(rank: int, deadline: float | None) -> None:
            pairs = [
                (product, list_[rank]) for product, list_ in plans.items() if rank < len(list_)
            ]
            kernels = [kernels_of(device, requests[product], plan) for product, plan in pairs]
            results = pool.map(lambda k: compile_kernels(k, deadline), kernels)
            for (product, plan), compiled in zip(pairs, results, strict=True):
                if compiled:
                    done[product].append(plan)

        compile_rank(0, None)
        began = clock()
        for rank in range(1, MOST_CANDIDATES):
            compile_rank(rank, began + seconds)
    return _Compiled(done, clock() - began)


def _fastest_of(
    device: Device,
    request: Request,
    plans: Sequence[Plan],
    stopwatch: Stopwatch,
    clock: Callable[[], float],
    until: float,
    warm: bool,
) -> Plan:
    """Times plans in turns, each round beginning with another, and compares medians."""
    bench = Workbench(device)
    try:
        stand_ins: dict[int, Tensor] = {}
        programs = [bench.program(request, plan, stand_ins) for plan in plans[:1]]
        once = stopwatch(programs, 1)[0]
        begun = clock()
        while not warm and clock() < min(begun + _WARM_UP_SECONDS, until):
            once = stopwatch(programs, stopwatch.repeats(once))[0]
        once = stopwatch(programs, stopwatch.repeats(once))[0]
        repeats = stopwatch.repeats(once)
        affordable = int((until - clock()) / (_ROUNDS * repeats * max(once, 1e-9)))
        if affordable < 2:
            return plans[0]
        for plan in plans[1:affordable]:
            if clock() < until:
                programs.append(bench.program(request, plan, stand_ins))
                stopwatch(programs[-1:], 1)  # some drivers compile a kernel when it first runs
        times: list[list[float]] = [[] for _ in programs]
        for turn in range(_ROUNDS):
            if clock() >= until:
                break
            order = [(turn + i) % len(programs) for i in range(len(programs))]
            measured = stopwatch([programs[i] for i in order], repeats)
            for index, value in zip(order, measured, strict=True):
                times[index].append(value)
        if len(times[0]) < _FEWEST_ROUNDS:
            return plans[0]
        return fastest(dict(zip(plans, times, strict=False)))
    finally:
        bench.close()


def fastest(times: Mapping[Plan, Sequence[float]]) -> Plan:
    """The plan of the smallest median; the first one where none is 3% faster than it."""
    medians = {plan: statistics.median(values) for plan, values in times.items()}
    first = next(iter(medians))
    best = min(medians, key=medians.__getitem__)
    return best if medians[best] < (1 - _MARGIN) * medians[first] else first
