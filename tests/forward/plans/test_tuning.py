"""Which plan a product is recorded with, and the choice by timings (those of a fake stopwatch)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import wgpu
from gguf import quants

from lora.backward.matmul import matmul_backward
from lora.backward.rmsnorm import NormBefore
from lora.forward.matmul import matmul
from lora.forward.plans.matmul_plans import (
    Product,
    Request,
    plan_of,
    requests_of,
    use_plans,
    use_source,
)
from lora.forward.plans.matmul_tiles import Plan, candidates, choose_tile, cut, tiles_of
from lora.forward.plans.tuning import fastest, tune
from lora.forward.plans.workbench import Stopwatch, Workbench, kernels_of
from lora.shaders.device import Device
from lora.shaders.planning import PlanningDevice
from lora.shaders.program import Dispatch, Program
from lora.shaders.tensor import Tensor
from tests.support.half_tensors import needs_halves
from tests.support.kernels import activation, extent_in_use
from tests.support.plans import N_IN, N_OUT, Q8_0, a_matrix, planned_requests
from tests.support.quantized_tensors import random_blocks

ROWS = 70


@pytest.fixture
def tiled(device: Device) -> Iterator[Device]:
    device.matmul_body = "tiled"
    yield device
    device.matmul_body = None
    use_source(device, None)


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
            command = program.commands[0]
            assert isinstance(command, Dispatch)
            self.labels.add(command.label)
            taken.append(self.seconds(command.label))
        self.now += repeats * sum(taken)
        return taken

    def clock(self) -> float:
        return self.now


def plans_of(device: Device, request: Request) -> list[Plan]:
    return candidates(*request.shape(device))


def test_an_attached_plan_is_recorded_and_computes_the_product(tiled: Device) -> None:
    matrix, data = a_matrix(tiled), random_blocks(Q8_0, N_OUT, N_IN)
    extent = extent_in_use(tiled, ROWS, ROWS)
    values = np.random.default_rng(0).normal(size=(ROWS, N_IN)).astype(np.float32)
    x = activation(tiled, values, extent)
    with requests_of(tiled) as requests:
        matmul(Program(tiled), x, matrix)
    (request,) = requests
    model = choose_tile(*request.shape(tiled))
    # Of two plans one at least is not the model's.
    whole = Plan(tiles_of(False)[0], *cut(N_IN, 1, 32))
    use_plans(tiled, {request.product: whole})
    program = Program(tiled)
    matmul(program, x, matrix)
    assert [c.template for c in program.commands] == ["matmul_tiled"]
    assert program.commands[0].workgroups == (3, 3, 1)  # 96 / 32, 70 / 32
    use_plans(tiled, {request.product: Plan(tiles_of(False)[1], *cut(N_IN, 2, 32))})
    program = Program(tiled)
    out = matmul(program, x, matrix)
    assert [c.template for c in program.commands] == ["matmul_tiled", "matmul_reduce"]
    assert program.commands[0].workgroups == (2, 3, 2)  # 96 / 64, 70 / 32, two stretches
    program.run()
    w = quants.dequantize(data, Q8_0).reshape(N_OUT, N_IN).astype(np.float64)
    wanted = values.astype(np.float64) @ w.T
    # As in test_matmul.py: errors grow as sqrt(n) · 2^-24 of the largest result.
    bound = 4 * np.sqrt(N_IN) * 2.0**-24 * np.abs(wanted).max()
    assert np.abs(tiled.read(out) - wanted).max() < bound
    assert plan_of(PlanningDevice(tiled), request) == model  # another device has its own plans
    use_source(tiled, None)
    assert plan_of(tiled, request) == model


def test_what_a_product_is(tiled: Device) -> None:
    """Rows count in steps of the smallest tile, whose grid they decide; directions differ."""
    of_rows = {
        rows: [r.product for r in planned_requests(tiled, [(rows, N_OUT, N_IN)])]
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
    plans = candidates(512, 576, 1536, 49152)[: len(times)]
    # One outlier each, which a mean would take for a difference.
    series = {p: [t, t, 10 * t, t, t] for p, t in zip(plans, times, strict=True)}
    assert fastest(series) == plans[winner]


@pytest.mark.parametrize("half", [False, True])
def test_the_choice_follows_the_timings(tiled: Device, half: bool) -> None:
    if half:
        needs_halves(tiled)
    tiled.precision = "f16" if half else "f32"
    try:
        requests = planned_requests(tiled, [(256, 512, 1024)])
        tiled.precision = "f32"  # what counts is how the product was recorded
        products = [request.product for request in requests]
        for wanted in (0, 2, -1):
            picked = {r.label: candidates(*r.shape(tiled))[wanted] for r in requests}
            fast = {f"{label} {plan.name}" for label, plan in picked.items()}
            watch = FakeStopwatch(tiled, lambda label, fast=fast: 9e-4 if label in fast else 1e-3)
            found = tune(tiled, requests, seconds=60.0, stopwatch=watch, clock=watch.clock)
            assert [found[p] for p in products] == list(picked.values())
            timed = {f"{r.label} {plan.name}" for r in requests for plan in plans_of(tiled, r)}
            assert watch.labels == timed
        assert all(plan.tile.item_bytes == (2 if half else 4) for plan in found.values())
    finally:
        tiled.precision = "f32"


def test_slow_devices_keep_to_the_time(tiled: Device) -> None:
    """Where rounds of timings would not fit, the model's choices stay."""
    requests = planned_requests(tiled, [(256, 512, 1024), (256, 1024, 512)])
    model = {r.product: choose_tile(*r.shape(tiled)) for r in requests}
    slower = {f"{r.label} {plans_of(tiled, r)[0].name}" for r in requests}
    for once, seconds in ((0.3, 2.0), (0.01, 0.0)):
        watch = FakeStopwatch(tiled, lambda label, once=once: once if label in slower else once / 2)
        found = tune(tiled, requests, seconds=seconds, stopwatch=watch, clock=watch.clock)
        assert found == model
        # To see what is affordable each product may time the model's choice a few times.
        assert watch.now <= seconds + 2 * len(model) * once


def test_slow_compilers_keep_to_the_time(tiled: Device) -> None:
    """Where each look at the clock finds a second gone, no loser is compiled, nothing timed."""
    requests = planned_requests(tiled, [(192, 480, 1024), (192, 800, 512)])
    watch = FakeStopwatch(tiled, lambda label: 1e-3)
    ticks = itertools.count()
    before = len(tiled._pipelines)
    found = tune(tiled, requests, seconds=0.5, stopwatch=watch, clock=lambda: float(next(ticks)))
    model = {r.product: choose_tile(*r.shape(tiled)) for r in requests}
    assert found == model and not watch.labels
    kernels = [kernels_of(tiled, r, model[r.product]) for r in requests]
    assert len(tiled._pipelines) - before == len({repr(k) for ks in kernels for k in ks})


def test_a_few_candidates_where_time_is_short(tiled: Device) -> None:
    """With time for three plans the best of the first three is taken, though a later is faster."""
    (request, _) = planned_requests(tiled, [(256, 512, 1024)])
    plans = plans_of(tiled, request)
    third, last = f"{request.label} {plans[2].name}", f"{request.label} {plans[-1].name}"
    speeds = {third: 8e-3, last: 1e-3}
    watch = FakeStopwatch(tiled, lambda label: speeds.get(label, 1e-2))
    # 0.1 s of warm-up, then five rounds of three at 10 ms are 0.15 s.
    found = tune(tiled, [request], seconds=0.28, stopwatch=watch, clock=watch.clock)
    assert found == {request.product: plans[2]}
    assert last not in watch.labels


def test_nothing_stays_behind(tiled: Device) -> None:
    """Tuning takes memory of its own and gives it back; the device still records the model's."""
    (request, _) = planned_requests(tiled, [(64, 128, 1024)])
    before = dict(tiled.allocated), list(tiled._scratch)
    watch = FakeStopwatch(tiled, lambda label: 1e-3)
    tune(tiled, [request], seconds=60.0, stopwatch=watch, clock=watch.clock)
    assert (dict(tiled.allocated), list(tiled._scratch)) == before
    assert plan_of(tiled, request) == choose_tile(*request.shape(tiled))
    bench = Workbench(tiled)
    tensor = bench.empty((64,))
    tiled.write(tensor, np.zeros(64))
    bench.close()
    with pytest.raises(wgpu.GPUValidationError, match="destroyed"):
        tiled.write(tensor, np.zeros(64))


def test_training_finds_the_kernels_that_tuning_compiled(tiled: Device) -> None:
    (request, _) = planned_requests(tiled, [(64, 160, 640)])
    watch = FakeStopwatch(tiled, lambda label: 1e-3)
    found = tune(tiled, [request], seconds=60.0, stopwatch=watch, clock=watch.clock)
    use_plans(tiled, found)
    compiled = len(tiled._pipelines)
    matrix, extent = a_matrix(tiled, 160, 640), tiled.extent(64)
    matmul(Program(tiled), tiled.empty((64, 640), extent=extent), matrix)
    assert len(tiled._pipelines) == compiled


@pytest.mark.parametrize("stamps", [True, False])
def test_the_real_stopwatch(tiled: Device, stamps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of 128 times the work takes longer, with and without timestamps.

    On a GPU of 65,536 times the work: a launch takes some microseconds, however little it does.
    """
    if not stamps:
        monkeypatch.setattr(tiled, "features", tiled.features - {"timestamp-query"})
    elif "timestamp-query" not in tiled.features:
        pytest.skip("the adapter lacks timestamp-query")
    many = (512, 256, 256) if tiled.is_cpu else (4096, 2048, 2048)
    small, _, large, _ = planned_requests(tiled, [(64, 64, 64), many])
    bench = Workbench(tiled)
    programs = [bench.program(r, choose_tile(*r.shape(tiled)), {}) for r in (small, large)]
    watch = Stopwatch(tiled)
    watch(programs, 1)  # the software driver compiles a kernel when it first runs
    times = np.array([watch(programs, 2) for _ in range(5)])
    bench.close()
    # The smallest of each, since other processes share the cores.
    assert 0 < times[:, 0].min() < times[:, 1].min()
    assert watch.repeats(1e9) == 1 < watch.repeats(1e-6) <= 16


def test_a_product_is_timed_with_its_norm(tiled: Device) -> None:
    """Which may be the last pass of a plan with stretches; in place stays in place."""
    planning = PlanningDevice(tiled)
    extent = planning.extent(64)
    d_y, d_x, x = (planning.empty((64, 96), extent=extent) for _ in range(3))
    out, weight = planning.empty((64, 96), extent=extent), planning.empty((96,))
    matrix = a_matrix(planning, 96, 96)
    with requests_of(planning) as requests:
        norm = NormBefore(x, weight, 1e-5, d_x, residual=d_x)
        matmul_backward(Program(planning), d_y, matrix, out=out, norm=norm)
        matmul_backward(Program(planning), d_y, matrix, out=out)
    normed, bare = requests
    assert normed.product.normed and normed.product != bare.product
    tile = tiles_of(False)[0]
    plans = {splits: Plan(tile, *cut(96, splits, tile.depth)) for splits in (1, 3)}
    kernels = {n: [name for name, _ in kernels_of(tiled, normed, p)] for n, p in plans.items()}
    assert kernels[1] == kernels[3] == ["matmul_tiled", "rmsnorm_backward"]
    assert [n for n, _ in kernels_of(tiled, bare, plans[3])] == ["matmul_tiled", "matmul_reduce"]
    bench = Workbench(tiled)
    for plan in plans.values():
        stand_ins: dict[int, Tensor] = {}
        program = bench.program(normed, plan, stand_ins)
        _, last = program.commands
        assert isinstance(last, Dispatch) and last.template == "rmsnorm_backward"
        held = [stand_ins[id(tensor)].buffer for tensor in (x, weight, d_x)]
        assert all(any(t.buffer is buffer for t in last.tensors) for buffer in held)
        assert len(last.tensors) == 5  # the residual is d_x, not bound again
        program.run()
    bench.close()


def test_stand_ins_hold_ordinary_numbers(tiled: Device) -> None:
    """Random bits would be NaN here and there, and some hardware is slow at those."""
    bench = Workbench(tiled)
    for dtype in ("f32", "f16"):
        like = PlanningDevice(tiled).empty((60, 1000), dtype)
        values = tiled.read(bench._filled(like, tiled.extent(60)))
        assert np.isfinite(values).all() and np.abs(values).max() <= 2 and len(set(values[0])) > 900
    bench.close()


def test_requests_are_collected_in_their_block_only(tiled: Device) -> None:
    requests = planned_requests(tiled, [(64, 64, 64)])
    assert [r.label for r in requests] == ["matmul", "matmul_backward"]
    product: Product = requests[0].product
    planning = PlanningDevice(tiled)
    x = planning.empty((64, 64), extent=planning.extent(64))
    with requests_of(planning) as collected:
        pass
    matmul(Program(planning), x, a_matrix(planning, 64, 64))
    assert collected == [] and product.rows == 64
