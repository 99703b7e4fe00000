"""The choice among the plans of matmul_tiled by their times on the device.

A plan decides in which order sums are taken, so the last bits of results depend on it: who tunes
keeps what was found (lora/storage/tile_cache.py).
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from lora.forward.plans.matmul_plans import ProductShape, Request
from lora.forward.plans.matmul_tiles import (
    MOST_CANDIDATES,
    Plan,
    candidates,
    choose_plan,
)
from lora.forward.plans.workbench import Kernels, Stopwatch, Workbench, fits, kernels_of
from lora.shaders.device import COMPILING_THREADS, Device
from lora.shaders.errors import DeviceMemoryError, GPUError
from lora.shaders.tensor import Tensor

TUNING_SECONDS = 4.0  # that the first start of a training may take longer
_COMPILING_SHARE = 0.6  # of them, for kernels that training might not need
_WARM_UP_SECONDS = 0.3  # an idle GPU clocks low, and takes a while to speed up
_ROUNDS = 5  # times that every candidate is timed
_FEWEST_ROUNDS = 3  # fewer decide nothing
_MARGIN = 0.03  # by which another plan must be faster than the model's


def tune(
    device: Device,
    requests: Iterable[Request],
    *,
    seconds: float = TUNING_SECONDS,
    stopwatch: Stopwatch | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[ProductShape, Plan]:
    """Times the best few plans of each product, with the real kernels, and takes the fastest.

    What takes the largest share of a step by the model goes first. The model's choice stays where
    no other is 3% faster, and where time was too short to say. The time is bounded: `seconds`
    (and what one timing takes), beside the compilation of kernels that the model chose, which
    would be needed anyway. Losing kernels are compiled by several threads for 60% of it. Products
    with dropout are timed without their masks, whose plans they take: on an H200 the masks' own
    timings chose plans that were slower in the step.

    Args:
        device: no CPU device: those compile tiled kernels for seconds each.
        requests: the products of a training step, each as often as it occurs.
        seconds: to spend.
        stopwatch: what times programs.
        clock: seconds that pass.

    Returns:
        A plan for every product of the requests.
    """
    first: dict[ProductShape, Request] = {}
    share: Counter[ProductShape] = Counter()
    for request in requests:
        product = request.product
        first.setdefault(product, request.unmasked)
        space = request.space(device.facts)
        share[product] += round(1e3 * space.microseconds(choose_plan(space)))
    heaviest_first = [product for product, _ in share.most_common()]
    plans = {}
    for product in heaviest_first:
        request = first[product]
        model, *others = candidates(request.space(device.facts))
        plans[product] = [model, *(plan for plan in others if fits(device.facts, request, plan))]
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
    plans: dict[ProductShape, list[Plan]]
    seconds: float  # what the plans after the first took


def _compile(
    device: Device,
    requests: Mapping[ProductShape, Request],
    plans: Mapping[ProductShape, Sequence[Plan]],
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
        except GPUError:
            if deadline is None:
                raise
            return False  # a candidate that a driver cannot compile is none
        return True

    done: dict[ProductShape, list[Plan]] = {product: [] for product in plans}
    with ThreadPoolExecutor(min(COMPILING_THREADS, os.cpu_count() or 1)) as pool:

        def compile_rank(rank: int, deadline: float | None) -> None:
            pairs = [
                (product, list_[rank]) for product, list_ in plans.items() if rank < len(list_)
            ]
            kernels = [kernels_of(device.facts, requests[product], plan) for product, plan in pairs]
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
    with Workbench(device) as bench:
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


def fastest(times: Mapping[Plan, Sequence[float]]) -> Plan:
    """The plan of the smallest median; the first one where none is 3% faster than it."""
    medians = {plan: statistics.median(values) for plan, values in times.items()}
    first = next(iter(medians))
    best = min(medians, key=medians.__getitem__)
    return best if medians[best] < (1 - _MARGIN) * medians[first] else first
