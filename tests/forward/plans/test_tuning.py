"""Which plan a product is recorded with, and the choice by timings (those of a fake stopwatch)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from gguf import quants

from lora.backward.matmul import matmul_backward
from lora.backward.rmsnorm import NormBefore
from lora.forward.matmul import matmul
from lora.forward.model.norm import Norm
from lora.forward.plans.matmul_plans import Request, noting, plan_of, source_of
from lora.forward.plans.matmul_tiles import Plan, PlanSpace, candidates, choose_plan, cut, tiles_of
from lora.forward.plans.tuning import fastest, tune
from lora.forward.plans.workbench import Stopwatch, Workbench, kernels_of
from lora.forward.product import Product
from lora.shaders.device import Device
from lora.shaders.errors import LoraError
from lora.shaders.memory import CountingMemory
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor
from tests.support.half_tensors import needs_halves
from tests.support.kernels import activation, extent_in_use
from tests.support.plans import N_IN, N_OUT, Q8_0, a_matrix, planned_requests
from tests.support.quantized_tensors import random_blocks

ROWS = 70


@pytest.fixture
def tiled(recording: Recording) -> Recording:
    return replace(recording, body="tiled")


class FakeStopwatch(Stopwatch):
    """Runs nothing: `seconds` of a product's label say what it took; the clock goes on by it."""

    def __init__(self, device: Device, seconds: Callable[[str], float]) -> None:
        super().__init__(device)
        self.seconds = seconds
        self.now = 0.0
        self.labels: set[str] = set()

    def __call__(self, programs: Sequence[Program], repeats: int) -> list[float]:
        taken = []
        for program in programs:
            label = program.dispatches[0].label
            self.labels.add(label)
            taken.append(self.seconds(label))
        self.now += repeats * sum(taken)
        return taken

    def clock(self) -> float:
        return self.now


def plans_of(device: Device, request: Request) -> list[Plan]:
    return candidates(request.space(device.facts))


def test_a_plan_is_recorded_and_computes_the_product(tiled: Recording) -> None:
    matrix, data = a_matrix(tiled), random_blocks(Q8_0, N_OUT, N_IN)
    extent = extent_in_use(tiled, ROWS, ROWS)
    values = np.random.default_rng(0).normal(size=(ROWS, N_IN)).astype(np.float32)
    x = activation(tiled, values, extent)
    requests: list[Request] = []
    matmul(Program(replace(tiled, plans=noting(requests))), Product(x, matrix))
    (request,) = requests
    model = choose_plan(request.space(tiled.facts))
    # Of two plans one at least is not the model's.
    whole = Plan(tiles_of(False)[0], *cut(N_IN, 1, 32))
    program = Program(replace(tiled, plans=source_of({request.product: whole})))
    matmul(program, Product(x, matrix))
    assert [c.template for c in program.dispatches] == ["matmul_tiled"]
    assert program.commands[0].workgroups == (3, 3, 1)  # 96 / 32, 70 / 32
    halves = Plan(tiles_of(False)[1], *cut(N_IN, 2, 32))
    attached = replace(tiled, plans=source_of({request.product: halves}))
    program = Program(attached)
    out = matmul(program, Product(x, matrix))
    assert [c.template for c in program.dispatches] == ["matmul_tiled", "matmul_reduce"]
    assert program.commands[0].workgroups == (2, 3, 2)  # 96 / 64, 70 / 32, two stretches
    program.run()
    w = quants.dequantize(data, Q8_0).reshape(N_OUT, N_IN).astype(np.float64)
    wanted = values.astype(np.float64) @ w.T
    # As in test_matmul.py: errors grow as sqrt(n) · 2^-24 of the largest result.
    bound = 4 * np.sqrt(N_IN) * 2.0**-24 * np.abs(wanted).max()
    assert np.abs(tiled.memory.read(out) - wanted).max() < bound
    assert plan_of(attached, request) == halves
    assert plan_of(tiled, request) == model  # other recordings have their own plans


def test_what_a_product_is(device: Device) -> None:
    """Rows count in steps of the smallest tile, whose grid they decide; directions differ."""
    of_rows = {
        rows: [r.product for r in planned_requests(device.facts, [(rows, N_OUT, N_IN)])]
        for rows in (65, 70, 96, 97)
    }
    assert of_rows[65] == of_rows[70] == of_rows[96] != of_rows[97]
    forward, backward = of_rows[70]
    assert (forward.columns, forward.contraction, forward.transposed) == (N_OUT, N_IN, False)
    assert (backward.columns, backward.contraction, backward.transposed) == (N_IN, N_OUT, True)
    assert forward.key != backward.key and "quantization=q8_0" in forward.key


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ([100, 98, 99], 0),  # 2% faster: could be noise
        ([100, 96, 99], 1),
        ([100, 120, 96], 2),
        ([100, 100, 100], 0),
    ],
)
def test_another_plan_must_be_three_percent_faster(times: list[float], winner: int) -> None:
    plans = candidates(PlanSpace(512, 576, 1536, tiles_of(False, 49152)))[: len(times)]
    # One outlier each, which a mean would take for a difference.
    series = {p: [t, t, 10 * t, t, t] for p, t in zip(plans, times, strict=True)}
    assert fastest(series) == plans[winner]


@pytest.mark.parametrize("half", [False, True])
def test_the_choice_follows_the_timings(device: Device, half: bool) -> None:
    precision = "f16" if half else "f32"
    if half:
        needs_halves(device.facts)
    requests = planned_requests(device.facts, [(256, 512, 1024)], precision)
    products = [request.product for request in requests]
    for wanted in (0, 2, -1):
        picked = {r.label: plans_of(device, r)[wanted] for r in requests}
        fast = {f"{label} {plan.name}" for label, plan in picked.items()}
        watch = FakeStopwatch(device, lambda label, fast=fast: 9e-4 if label in fast else 1e-3)
        found = tune(device, requests, seconds=60.0, stopwatch=watch, clock=watch.clock)
        assert [found[p] for p in products] == list(picked.values())
        timed = {f"{r.label} {plan.name}" for r in requests for plan in plans_of(device, r)}
        assert watch.labels == timed
    assert all(plan.tile.item_bytes == (2 if half else 4) for plan in found.values())


def test_slow_devices_keep_to_the_time(device: Device) -> None:
    """Where rounds of timings would not fit, the model's choices stay."""
    requests = planned_requests(device.facts, [(256, 512, 1024), (256, 1024, 512)])
    model = {r.product: choose_plan(r.space(device.facts)) for r in requests}
    slower = {f"{r.label} {plans_of(device, r)[0].name}" for r in requests}
    for once, seconds in ((0.3, 2.0), (0.01, 0.0)):
        watch = FakeStopwatch(
            device, lambda label, once=once: once if label in slower else once / 2
        )
        found = tune(device, requests, seconds=seconds, stopwatch=watch, clock=watch.clock)
        assert found == model
        # To see what is affordable each product may time the model's choice a few times.
        assert watch.now <= seconds + 2 * len(model) * once


def test_slow_compilers_keep_to_the_time(device: Device) -> None:
    """Where each look at the clock finds a second gone, no loser is compiled, nothing timed."""
    requests = planned_requests(device.facts, [(192, 480, 1024), (192, 800, 512)])
    watch = FakeStopwatch(device, lambda label: 1e-3)
    ticks = itertools.count()
    before = len(device._pipelines)
    found = tune(device, requests, seconds=0.5, stopwatch=watch, clock=lambda: float(next(ticks)))
    model = {r.product: choose_plan(r.space(device.facts)) for r in requests}
    assert found == model and not watch.labels
    kernels = [kernels_of(device.facts, r, model[r.product]) for r in requests]
    assert len(device._pipelines) - before == len({repr(k) for ks in kernels for k in ks})


def test_a_few_candidates_where_time_is_short(device: Device) -> None:
    """With time for three plans the best of the first three is taken, though a later is faster."""
    (request, _) = planned_requests(device.facts, [(256, 512, 1024)])
    plans = plans_of(device, request)
    third, last = f"{request.label} {plans[2].name}", f"{request.label} {plans[-1].name}"
    speeds = {third: 8e-3, last: 1e-3}
    watch = FakeStopwatch(device, lambda label: speeds.get(label, 1e-2))
    # 0.3 s of warm-up, then five rounds of three at 10 ms are 0.15 s.
    found = tune(device, [request], seconds=0.48, stopwatch=watch, clock=watch.clock)
    assert found == {request.product: plans[2]}
    assert last not in watch.labels


def test_nothing_stays_behind(device: Device) -> None:
    """Tuning takes memory of its own and gives it back."""
    (request, _) = planned_requests(device.facts, [(64, 128, 1024)])
    watch = FakeStopwatch(device, lambda label: 1e-3)
    before = dict(device.allocated)
    tune(device, [request], seconds=60.0, stopwatch=watch, clock=watch.clock)
    assert dict(device.allocated) == before
    with Workbench(device) as bench:
        program = bench.program(request, plans_of(device, request)[0], {})
        assert device.allocated.total() > sum(before.values())
    assert dict(device.allocated) == before
    with pytest.raises(LoraError, match="was closed"):
        program.run()


def test_training_finds_the_kernels_that_tuning_compiled(device: Device, tiled: Recording) -> None:
    (request, _) = planned_requests(device.facts, [(64, 160, 640)])
    watch = FakeStopwatch(device, lambda label: 1e-3)
    found = tune(device, [request], seconds=60.0, stopwatch=watch, clock=watch.clock)
    compiled = len(device._pipelines)
    matrix, extent = a_matrix(tiled, 160, 640), tiled.memory.extent(64)
    x = tiled.memory.empty((64, 640), extent=extent)
    matmul(Program(replace(tiled, plans=source_of(found))), Product(x, matrix))
    assert len(device._pipelines) == compiled


@pytest.mark.parametrize("stamps", [True, False])
def test_the_real_stopwatch(device: Device, stamps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of 128 times the work takes longer, with and without timestamps.

    On a GPU of 65,536 times the work: a launch takes some microseconds, however little it does.
    """
    facts = device.facts
    if not stamps:
        without = replace(facts, features=facts.features - {"timestamp-query"})
        monkeypatch.setattr(device, "facts", without)
    elif "timestamp-query" not in facts.features:
        pytest.skip("the adapter lacks timestamp-query")
    many = (512, 256, 256) if facts.is_cpu else (4096, 2048, 2048)
    small, _, large, _ = planned_requests(facts, [(64, 64, 64), many])
    with Workbench(device) as bench:
        programs = [bench.program(r, choose_plan(r.space(facts)), {}) for r in (small, large)]
        watch = Stopwatch(device)
        watch(programs, 1)  # the software driver compiles a kernel when it first runs
        times = np.array([watch(programs, 2) for _ in range(5)])
    # The smallest of each, since other processes share the cores.
    assert 0 < times[:, 0].min() < times[:, 1].min()
    assert watch.repeats(1e9) == 1 < watch.repeats(1e-6) <= 64


def test_a_product_is_timed_with_its_norm(device: Device) -> None:
    """Which may be the last pass of a plan with stretches; in place stays in place."""
    requests: list[Request] = []
    facts = device.facts
    counting = Recording(facts, CountingMemory(facts), body="tiled", plans=noting(requests))
    extent = counting.memory.extent(64)
    d_y, d_x, x, out = (counting.memory.empty((64, 96), extent=extent) for _ in range(4))
    weight, matrix = counting.memory.empty((96,)), a_matrix(counting, 96, 96)
    norm = NormBefore(x, Norm(weight, 1e-5), d_x, residual=d_x)
    matmul_backward(Program(counting), d_y, matrix, out=out, before=norm)
    matmul_backward(Program(counting), d_y, matrix, out=out)
    normed, bare = requests
    assert normed.product.normed and normed.product != bare.product
    tile = tiles_of(False)[0]
    plans = {splits: Plan(tile, *cut(96, splits, tile.depth)) for splits in (1, 3)}
    kernels = {n: [name for name, _ in kernels_of(facts, normed, p)] for n, p in plans.items()}
    assert kernels[1] == kernels[3] == ["matmul_tiled", "rmsnorm_backward"]
    assert [n for n, _ in kernels_of(facts, bare, plans[3])] == ["matmul_tiled", "matmul_reduce"]
    with Workbench(device) as bench:
        for plan in plans.values():
            stand_ins: dict[int, Tensor] = {}
            program = bench.program(normed, plan, stand_ins)
            _, last = program.dispatches
            assert last.template == "rmsnorm_backward"
            held = [stand_ins[id(tensor)].buffer for tensor in (x, weight, d_x)]
            assert all(any(t.buffer is buffer for t in last.tensors) for buffer in held)
            assert len(last.tensors) == 5  # the residual is d_x, not bound again
            program.run()


def test_stand_ins_hold_ordinary_numbers(device: Device) -> None:
    """Random bits would be NaN here and there, and some hardware is slow at those."""
    with Workbench(device) as bench:
        for dtype in ("f32", "f16"):
            like = CountingMemory(device.facts).empty((60, 1000), dtype)
            values = device.memory.read(bench._filled(like, device.memory.extent(60)))
            assert np.isfinite(values).all() and np.abs(values).max() <= 2
            assert len(set(values[0])) > 900
