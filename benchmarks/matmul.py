"""Every tile and split of the tiled matmul, timed on the products of training steps.

    python benchmarks/matmul.py [--runs SmolLM2-135M:512,…] [--precisions f32,f16] [--seconds 120]
        [--output FILE]
    python benchmarks/matmul.py --fit FILE [FILE …]

A run is a model of benchmarks/synthetic.py and the tokens of a micro-batch; its products are those
of a layer, adapted with rank 16, and of a chunk of the head, in both directions. For each the plans
that forward/plans/matmul_tiles.py thinks at most --within times slower than its choice are
timed in turns (the median counts), and a line says what the model chooses, what the tuner would
choose among its candidates, and the best of all, with what the first two lose. --output (by
default $OUT/matmul.json, where OUT is set) gets all timings.

--fit takes such files, and prints the model's constants that fit their timings best, with what the
model would lose by them on the same shapes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from lora.backward.matmul import matmul_backward
from lora.forward.decoder.head import chunk_size
from lora.forward.gguf.file import GGUFTensor
from lora.forward.matmul import matmul
from lora.forward.model.factors import LoraFactors
from lora.forward.model.weights import FrozenMatrix, load_matrix
from lora.forward.plans.matmul_plans import Request, noting
from lora.forward.plans.matmul_tiles import (
    Plan,
    candidates,
    ranked_plans,
    tiles_of,
)
from lora.forward.plans.tuning import fastest
from lora.forward.plans.workbench import Stopwatch, Workbench, fits, kernels_of
from lora.forward.product import Product
from lora.shaders.device import Device
from lora.shaders.facts import DeviceFacts
from lora.shaders.memory import CountingMemory
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor
from tests.support.synthetic_models import SHAPES

RUNS = "SmolLM2-135M:512,SmolLM2-135M:2048,Gemma-3-270M:512,Gemma-3-270M:2048,Llama-1.2B:512"
RANK = 16
ROUNDS = 5
WARM_UP = 0.05  # seconds before the timings of a product, since its kernels were compiled just now
PASS_SECONDS: float | None = None  # see Stopwatch
COMPILING = 0.75  # of a product's time


# -- the products of a step ------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Matrices that share an input, as (out_features, tensor name) each."""

    name: str
    in_features: int
    members: tuple[tuple[int, str], ...]
    residual: bool = False


def groups_of(model: str) -> list[Group]:
    """The products of a layer."""
    s = SHAPES[model]
    query, kv = s.n_heads * s.head_size, s.n_kv_heads * s.head_size
    inner, hidden = s.intermediate_size, s.hidden_size
    residual = s.architecture != "gemma3"  # there a norm stands between
    return [
        Group("qkv", hidden, ((query, "attn_q"), (kv, "attn_k"), (kv, "attn_v"))),
        Group("attn_output", query, ((hidden, "attn_output"),), residual),
        Group("gate_up", hidden, ((inner, "ffn_gate"), (inner, "ffn_up"))),
        Group("down", inner, ((hidden, "ffn_down"),), residual),
    ]


def requests_of_run(
    facts: DeviceFacts, precision: str, model: str, rows: int
) -> list[tuple[str, Request]]:
    """The products of a run with their names."""
    shape = SHAPES[model]
    requests: list[Request] = []
    memory = CountingMemory(facts)
    recording = Recording(facts, memory, precision, plans=noting(requests))

    def matrix_of(members: Sequence[tuple[int, str]], in_features: int) -> FrozenMatrix:
        nothing = np.zeros((0, 0), np.uint8)  # memory that only counts takes no weights
        return load_matrix(
            recording,
            [
                GGUFTensor(name, shape.type_of(f"{name}.weight"), (n_out, in_features), nothing)
                for n_out, name in members
            ],
        )

    def activation(extent: Extent, width: int, dtype: str) -> Tensor:
        return memory.empty((extent.maximum, width), dtype, extent=extent)

    names: list[str] = []
    extent = memory.extent(rows)
    for group in groups_of(model):
        matrix = matrix_of(group.members, group.in_features)
        stops = np.cumsum([n for n, _ in group.members]).tolist()
        lora = LoraFactors(
            memory.empty((len(stops) * RANK, group.in_features)),
            memory.empty((matrix.out_features, RANK)),
            RANK,
            2.0,
            tuple(zip([0, *stops], stops, strict=False)),
        )
        z = activation(extent, len(stops) * RANK, "f32")
        x = activation(extent, group.in_features, recording.precision)
        out_type = "f32" if group.residual else recording.precision
        out = activation(extent, matrix.out_features, out_type)
        residual = activation(extent, matrix.out_features, "f32") if group.residual else None
        matmul(Program(recording), Product(x, matrix, lora=lora, z=z, residual=residual), out=out)
        d_y = activation(extent, matrix.out_features, recording.precision)
        d_x = activation(extent, group.in_features, recording.precision)
        matmul_backward(Program(recording), d_y, matrix, lora=lora, d_z=z, out=d_x)
        while len(names) < len(requests):
            transposed = requests[len(names)].constants["transposed"]
            names.append(group.name + (" backward" if transposed else ""))
    chunk = memory.extent(chunk_size(recording, shape.vocab_size, rows))
    head = matrix_of(((shape.vocab_size, "token_embd"),), shape.hidden_size)
    x, logits = (activation(chunk, n, "f32") for n in (head.in_features, head.out_features))
    matmul(Program(recording), Product(x, head), out=logits)
    matmul_backward(Program(recording), logits, head, out=x)
    while len(names) < len(requests):
        transposed = requests[len(names)].constants["transposed"]
        names.append("head" + (" backward" if transposed else ""))
    seen: dict[Any, tuple[str, Request]] = {}
    for name, request in zip(names, requests, strict=True):
        seen.setdefault(request.product, (name, request))
    return list(seen.values())


# -- timing ----------------------------------------------------------------------------------------


def time_plans(
    device: Device, request: Request, plans: Sequence[Plan], seconds: float
) -> dict[Plan, list[float]]:
    """Microseconds of plans, some values each; of as many as there is time for."""
    began = time.perf_counter()

    def compile_plan(plan: Plan) -> bool:
        if time.perf_counter() > began + COMPILING * seconds:
            return False
        for template, constants in kernels_of(device.facts, request, plan):
            device.pipeline(template, constants)
        return True

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(compile_plan, plans))
    plans = [plan for plan, done in zip(plans, compiled, strict=True) if done]
    if not plans:
        return {}
    watch = Stopwatch(device, PASS_SECONDS)
    with Workbench(device) as bench:
        stand_ins: dict[int, Tensor] = {}
        programs = [bench.program(request, plan, stand_ins) for plan in plans]
        once = watch(programs, 1)[0]
        warm = time.perf_counter() + WARM_UP
        while time.perf_counter() < warm:
            once = watch(programs[:1], watch.repeats(once))[0]
        times: dict[Plan, list[float]] = {plan: [] for plan in plans}
        for turn in range(ROUNDS):
            order = [(turn + i) % len(plans) for i in range(len(plans))]
            measured = watch([programs[i] for i in order], watch.repeats(once))
            for index, value in zip(order, measured, strict=True):
                times[plans[index]].append(1e6 * value)
    return times


def sweep(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times all products of all runs, prints a line each, returns the timings."""
    device = Device(options.device)
    facts = device.facts
    jobs = []
    for precision in options.precisions.split(","):
        if precision == "f16" and "shader-f16" not in facts.features:
            print(f"{facts.name} lacks shader-f16: nothing in f16")
            continue
        for run in options.runs.split(","):
            model, rows = run.rsplit(":", 1)
            for name, request in requests_of_run(facts, precision, model, int(rows)):
                jobs.append((precision, f"{run} {name}", request))
    print(f"{facts.name}, {facts.info['description']}: {len(jobs)} products")
    figures: list[dict[str, Any]] = []
    lost: dict[str, list[tuple[float, float]]] = {}
    end = time.perf_counter() + options.seconds
    for index, (precision, name, request) in enumerate(jobs):
        shape = request.space(facts)
        ranked = ranked_plans(shape)
        within = options.within * shape.microseconds(ranked[0])
        likely = [p for p in ranked if shape.microseconds(p) <= within]
        tuned = candidates(shape)
        # What the tuner would time comes first, so that a short run has it all.
        order = [*tuned, *(plan for plan in likely if plan not in tuned)]
        seconds = (end - time.perf_counter()) / (len(jobs) - index)
        plans = [plan for plan in order if fits(facts, request, plan)]
        times = time_plans(device, request, plans, seconds)
        medians = {plan: statistics.median(values) for plan, values in times.items()}
        if ranked[0] not in medians:
            print(f"{precision} {name}: no time left", flush=True)
            continue
        product = request.product
        for plan, microseconds in medians.items():
            figures.append(
                plan.tile.constants()
                | {"tile": plan.tile.name, "splits": plan.splits, "length": plan.length}
                | {"us": microseconds}
                | {"half": product.half, "rows": shape[0], "columns": shape[1]}
                | {"contraction": shape[2], "name": name, "product": product.key}
                | {"multiprocessors": facts.multiprocessors}
                | {"adapter": facts.name, "driver": facts.info["description"]}
            )
        best = min(medians, key=medians.__getitem__)
        choice = fastest({plan: times[plan] for plan in tuned if plan in times})
        losses = [100 * (medians[plan] / medians[best] - 1) for plan in (ranked[0], choice)]
        lost.setdefault(precision, []).append((losses[0], losses[1]))
        print(
            f"{precision} {name} {shape[0]}x{shape[1]}x{shape[2]} {product.quantization}: "
            f"model {ranked[0].name} {medians[ranked[0]]:.1f} us ({losses[0]:.1f}% lost), "
            f"tuner {choice.name} {medians[choice]:.1f} us ({losses[1]:.1f}% lost), "
            f"best of {len(medians)} {best.name} {medians[best]:.1f} us "
            f"({request.flops / medians[best] / 1e6:.1f} TFLOP/s)",
            flush=True,
        )
    for precision, pairs in lost.items():
        for who, values in zip(("model", "tuner"), zip(*pairs, strict=True), strict=True):
            print(
                f"{precision}: the {who} loses {statistics.fmean(values):.1f}% on average, "
                f"{max(values):.1f}% at most, over {len(values)} products"
            )
    return figures


# -- fitting ---------------------------------------------------------------------------------------


def fit(figures: Sequence[dict[str, Any]]) -> None:
    """Prints the constants that bring the model's times nearest to the measured ones.

    Least squares of the logarithms, one constant at a time over a factor that shrinks.
    """
    for half in (False, True):
        rows = [figure for figure in figures if figure["half"] == half]
        if rows:
            _fit_tiles(rows, half)


def _fit_tiles(figures: Sequence[dict[str, Any]], half: bool) -> None:
    tiles = list(tiles_of(half))
    tile_names = [tile.name for tile in tiles]
    figures = [figure for figure in figures if figure["tile"] in tile_names]
    index = np.array([tile_names.index(figure["tile"]) for figure in figures])

    def column(name: str) -> np.ndarray:
        return np.array([f[name] for f in figures], float)

    workgroups = np.ceil(column("rows") / column("tile_rows"))
    workgroups *= np.ceil(column("columns") / column("tile_columns"))
    load = np.ceil(workgroups * column("splits") / column("multiprocessors"))
    steps = column("length") / column("depth")
    split = column("splits") > 1
    partial = column("rows") * column("columns") * column("splits") / 1e6 * split
    measured = column("us")

    def predicted(constants: np.ndarray) -> np.ndarray:
        product, reduce, reduce_million = constants[:3]
        latency, work = constants[3::2][index], constants[4::2][index]
        time_of_steps = steps * np.maximum(latency, load * work)
        return product + time_of_steps + reduce * split + reduce_million * partial

    def error(constants: np.ndarray) -> float:
        return float(np.mean(np.log(predicted(constants) / measured) ** 2))

    constants = np.array([7.0, 3.3, 0.56] + [v for t in tiles for v in (t.latency, t.work)])
    least = error(constants)
    factor = 2.0
    while factor > 1.002:
        improved = False
        for place in range(len(constants)):
            for by in (factor, 1 / factor):
                tried = constants.copy()
                tried[place] *= by
                value = error(tried)
                if value < least - 1e-12:
                    constants, least, improved = tried, value, True
        if not improved:
            factor = math.sqrt(factor)
    print(
        f"{'f16' if half else 'f32'}: {len(figures)} timings, typical error "
        f"{100 * math.sqrt(least):.0f}%; _PRODUCT {constants[0]:.2f}, _REDUCE {constants[1]:.2f}, "
        f"_REDUCE_MILLION {constants[2]:.2f}"
    )
    for place, tile in enumerate(tiles):
        latency, work = constants[3 + 2 * place : 5 + 2 * place]
        count = int((index == place).sum())
        print(
            f"    {tile.name}: latency {latency:.2f}, work {work:.2f}  # {count} timings"
            + ("" if count else ": as before")
        )
    guesses = predicted(constants)
    losses = []
    for name in dict.fromkeys((f["name"], f["product"]) for f in figures):
        here = [i for i, f in enumerate(figures) if (f["name"], f["product"]) == name]
        chosen = min(here, key=lambda i: guesses[i])
        losses.append(100 * (measured[chosen] / min(measured[i] for i in here) - 1))
    print(
        f"    with these the model loses {statistics.fmean(losses):.1f}% on average, "
        f"{max(losses):.1f}% at most, over {len(losses)} products"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", default=RUNS, help="MODEL:TOKENS, separated by commas")
    parser.add_argument("--precisions", default="f32,f16")
    parser.add_argument("--within", type=float, default=2.5)
    parser.add_argument("--seconds", type=float, default=120.0, help="for all products together")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--fit", type=Path, nargs="+", metavar="FILE")
    options = parser.parse_args()
    if options.fit:
        fit([figure for path in options.fit for figure in json.loads(path.read_text())])
        return
    figures = sweep(options)
    output = options.output
    if output is None and "OUT" in os.environ:
        output = Path(os.environ["OUT"]) / "matmul.json"
    if output is not None:
        output.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
