"""Microseconds and GB/s of every kernel that is no matmul and no attention, over its tunables.

A kernel's tunables are the constants of its module; `--set` gives one another value, and several
values (separated by `/`) a column each, so that one run compares them:

    python benchmarks/small_kernels.py [--models SmolLM2] [--rows 128 512] [--only rmsnorm]
        [--set forward.rmsnorm.GPU_QUADS=1/2/4]

The kernels of the low-rank factors are divided by tables of tunings in forward/lora.py and
backward/lora.py; `--sweep [--seconds 60]` times candidates for them at the products of three models
in f32 and f16, and says what to write there.

Every kernel is recorded 20 times in one program, run once to warm up, and timed once with a
timestamp around each dispatch; the median counts. A kernel of several dispatches is their sum.
GB/s counts each tensor that must be read or written once; what stays in a cache shows as more
than the memory can give.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import backward.lora
import forward.lora
from backward.head_norm_rope import head_norm_rope_backward
from backward.lora import lora_gradients, lora_project_gradient
from backward.rmsnorm import rmsnorm_backward
from backward.swiglu import swiglu_backward
from forward.adapter import LoraFactors
from forward.cross_entropy import cross_entropy
from forward.head import chunk_rows
from forward.head_norm_rope import head_norm_rope
from forward.lora import lora_project
from forward.rmsnorm import rmsnorm
from forward.rope import rope
from forward.rope_frequencies import Rope
from forward.swiglu import swiglu
from forward.tuning import Stopwatch
from optim.adamw import adamw, step_words
from optim.clipping import gradient_norm
from shaders.device import Device
from shaders.planning import PlanningDevice
from shaders.program import Program
from shaders.tensor import Tensor

REPEATS = 20
ROUNDS, WARM_UP = 3, 0.5  # of a sweep: rounds over the candidates, seconds for the clocks
EPSILON = 1e-5


@dataclass(frozen=True)
class Shape:
    """What decides the size of a model's small kernels."""

    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    vocab_size: int
    n_layers: int
    qk_norm: bool = False

    def groups(self) -> dict[str, tuple[int, list[int]]]:
        """in_features and the members' out_features of a layer's products."""
        query, kv = self.n_heads * self.head_size, self.n_kv_heads * self.head_size
        return {
            "qkv": (self.hidden_size, [query, kv, kv]),
            "attn_output": (query, [self.hidden_size]),
            "gate_up": (self.hidden_size, [self.intermediate_size] * 2),
            "down": (self.intermediate_size, [self.hidden_size]),
        }


MODELS = {
    "SmolLM2": Shape(576, 1536, 9, 3, 64, 49152, 30),
    "Gemma3": Shape(640, 2048, 4, 1, 256, 262144, 18, qk_norm=True),
    "Llama": Shape(2048, 8192, 32, 8, 64, 128256, 16),
    "tiny": Shape(64, 128, 4, 2, 16, 1024, 2, qk_norm=True),  # to try this script
}


@dataclass(frozen=True)
class Kernel:
    """One call that appends dispatches, and the bytes that it must move."""

    name: str
    record: Callable[[Program], object]
    n_bytes: int


def layer_kernels(
    device: Device, shape: Shape, rows: int, rank: int, n_slices: int
) -> Iterator[Kernel]:
    """The kernels over the rows of a micro-batch."""
    extent = device.extent(rows)
    rng = np.random.default_rng(0)

    def new(*sizes: int) -> Tensor:
        tensor = device.empty((rows, *sizes), extent=extent)
        device.write(tensor, rng.standard_normal(tensor.shape, np.float32))
        return tensor

    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, kv = shape.n_heads * shape.head_size, shape.n_kv_heads * shape.head_size
    x, d_y, residual, out = (new(hidden) for _ in range(4))
    weight = device.upload(np.ones(hidden, np.float32))
    one = x.n_bytes
    yield Kernel("rmsnorm", lambda p: rmsnorm(p, x, weight, EPSILON, out=out), 2 * one)
    yield Kernel(
        "rmsnorm_backward",
        lambda p: rmsnorm_backward(p, x, weight, EPSILON, d_y, residual=residual, out=residual),
        4 * one,
    )
    qkv, d_qkv = new(query + 2 * kv), new(query + 2 * kv)
    positions = device.empty((rows,), "u32", extent=extent)
    device.write(positions, np.arange(rows, dtype=np.uint32))
    if shape.qk_norm:
        heads = {
            "n_heads": shape.n_heads,
            "n_kv_heads": shape.n_kv_heads,
            "head_size": shape.head_size,
            "interleaved": False,
        }
        w = device.upload(np.ones(shape.head_size, np.float32))
        turns = device.upload(Rope(10000.0, shape.head_size, interleaved=False).tables(rows))
        yield Kernel(
            "head_norm_rope",
            lambda p: head_norm_rope(p, qkv, w, w, EPSILON, positions, turns, out=d_qkv, **heads),
            2 * qkv.n_bytes,
        )
        yield Kernel(
            "head_norm_rope_backward",
            lambda p: head_norm_rope_backward(
                p, qkv, w, w, EPSILON, positions, turns, d_qkv, **heads
            ),
            3 * 4 * rows * (query + kv),
        )
    for interleaved in (True, False):
        tables = device.upload(Rope(10000.0, shape.head_size, interleaved).tables(rows))
        yield Kernel(
            "rope interleaved" if interleaved else "rope halves",
            lambda p, tables=tables, interleaved=interleaved: rope(  # type: ignore[misc]
                p, qkv, positions, tables, n_rotated_heads=shape.n_heads + shape.n_kv_heads,
                head_size=shape.head_size, interleaved=interleaved,
            ),
            2 * 4 * rows * (query + kv),
        )  # fmt: skip
    gate_up, gated = new(2 * inner), new(inner)
    yield Kernel("swiglu", lambda p: swiglu(p, gate_up, out=gated), 3 * gated.n_bytes)
    yield Kernel(
        "swiglu_backward",
        lambda p: swiglu_backward(p, gate_up, gated, out=gate_up),
        5 * gated.n_bytes,
    )
    for name, (n_in, sizes) in shape.groups().items():
        lora = random_factors(device, n_in, sizes, rank)
        source, d_output = new(n_in), new(sum(sizes))
        gradients = [random_factors(device, n_in, sizes, rank) for _ in range(n_slices)]
        z, d_z = new(len(sizes) * rank), new(len(sizes) * rank)
        factor_bytes = (lora.a.n_bytes, lora.b.n_bytes)
        inputs = source.n_bytes + z.n_bytes, d_output.n_bytes + d_z.n_bytes
        yield Kernel(
            f"{name}.z",
            lambda p, s=source, f=lora, z=z: lora_project(p, s, f, out=z),  # type: ignore[misc]
            inputs[0] + factor_bytes[0],
        )
        yield Kernel(
            f"{name}.d_z",
            lambda p, d=d_output, f=lora, o=d_z: lora_project_gradient(  # type: ignore[misc]
                p, d, f, out=o
            ),
            inputs[1] + factor_bytes[1],
        )
        yield Kernel(
            f"{name}.d_A d_B",
            lambda p, s=source, z=z, d=d_output, o=d_z, f=lora, g=gradients: (  # type: ignore[misc]
                lora_gradients(p, s, z, d, o, f, g)
            ),
            sum(inputs) + 2 * n_slices * sum(factor_bytes),
        )
    yield from head_kernels(device, shape, rows)


def random_factors(device: Device, in_features: int, sizes: list[int], rank: int) -> LoraFactors:
    """Factors that lie behind each other in one buffer, as the trainer's do."""
    n_a, n_b = len(sizes) * rank * in_features, sum(sizes) * rank
    first = -(-n_a // 64) * 64
    rng = np.random.default_rng(1)
    flat = device.upload(0.01 * rng.standard_normal(first + n_b, np.float32))
    stops = list(itertools.accumulate(sizes))
    return LoraFactors(
        flat.rows(0, n_a).reshape(len(sizes) * rank, in_features),
        flat.rows(first, first + n_b).reshape(sum(sizes), rank),
        rank,
        1.0,
        tuple((stop - size, stop) for stop, size in zip(stops, sizes, strict=True)),
    )


def head_kernels(device: Device, shape: Shape, rows: int) -> Iterator[Kernel]:
    """Cross-entropy over a chunk of logits, as large as the head makes them."""
    chunk = min(rows, chunk_rows(device, shape.vocab_size, rows))
    extent = device.extent(chunk)
    rng = np.random.default_rng(2)
    logits = device.empty((chunk, shape.vocab_size), extent=extent)
    device.write(logits, rng.standard_normal(logits.shape, np.float32))
    labels = device.empty((chunk,), "u32", extent=extent)
    device.write(labels, rng.integers(0, shape.vocab_size, chunk))
    losses, correct = (device.empty((chunk,), extent=extent) for _ in range(2))
    step = device.uniform()
    device.write(step, np.array([1 / chunk, 0, 0, 0], np.float32).view(np.uint32))
    for name, scale, passes in (("cross_entropy", step, 3), ("cross_entropy loss", None, 1)):
        yield Kernel(
            f"{name} {chunk} rows",
            lambda p, scale=scale: cross_entropy(  # type: ignore[misc]
                p, logits, labels, losses, correct, scale
            ),
            passes * logits.n_bytes,
        )


def optimizer_kernels(device: Device, shape: Shape, rank: int, n_slices: int) -> Iterator[Kernel]:
    """Norm, clip factor and AdamW over all parameters of an adapter on every linear layer."""
    query, kv = shape.n_heads * shape.head_size, shape.n_kv_heads * shape.head_size
    hidden, inner = shape.hidden_size, shape.intermediate_size
    sizes = [(hidden, query), (hidden, kv), (hidden, kv), (query, hidden), (hidden, inner),
             (hidden, inner), (inner, hidden)]  # fmt: skip
    n = -(-shape.n_layers * rank * sum(map(sum, sizes)) // 64) * 64
    slices = [device.empty_flat(n, purpose="gradients") for _ in range(n_slices)]
    parameters, first, second = (device.empty_flat(n, purpose="optimizer") for _ in range(3))
    state, step = device.empty((4,)), device.uniform()
    device.write(step, step_words(1e-4, 1, (0.9, 0.999)))
    yield Kernel(
        "gradient_norm",
        lambda p: gradient_norm(p, slices, state, max_norm=1.0),
        4 * n * (n_slices + (n_slices > 1)),
    )
    yield Kernel(
        "adamw",
        lambda p: adamw(
            p, parameters, slices[0], first, second, state, step,
            betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0,
        ),
        4 * n * 7,
    )  # fmt: skip


def seconds(device: Device, kernel: Kernel) -> float:
    """The median of one call's time on the device."""
    program = Program(device)
    for _ in range(REPEATS):
        kernel.record(program)
    program.run()
    times = [t.seconds for t in program.time()]
    n = len(times) // REPEATS
    return statistics.median(sum(times[i : i + n]) for i in range(0, len(times), n))


@dataclass(frozen=True)
class Product:
    """A product whose low-rank kernels are timed, on the device."""

    name: str
    rows: int
    lora: LoraFactors
    gradients: list[LoraFactors]
    x: Tensor
    d_y: Tensor
    z: Tensor
    d_z: Tensor

    @classmethod
    def allocate(
        cls, device: Device, model: str, rows: int, group: str, dtype: str, rank: int
    ) -> Product:
        n_in, sizes = MODELS[model].groups()[group]
        extent = device.extent(rows)
        rng = np.random.default_rng(3)

        def new(width: int, dtype: str = "f32") -> Tensor:
            tensor = device.empty((rows, width), dtype, extent=extent)
            device.write(tensor, rng.random(tensor.shape, np.float32))
            return tensor

        width = len(sizes) * rank
        return cls(
            f"{model} {rows} {group} {dtype}",
            rows,
            random_factors(device, n_in, sizes, rank),
            [random_factors(device, n_in, sizes, rank) for _ in range(backward.lora.MAX_SLICES)],
            new(n_in, dtype),
            new(sum(sizes), dtype),
            new(width),
            new(width),
        )


class ProjectionSweep:
    """z (`transposed` False) or d_z over how a GPU divides it; see forward.lora.Tuning."""

    def __init__(self, device: Device, transposed: bool) -> None:
        self.device, self.transposed = device, transposed
        self.name = "d_z" if transposed else "z"
        shapes = [(8, 1, 4), (4, 1, 4), (2, 1, 4), (4, 2, 4), (8, 2, 4), (8, 1, 2), (4, 1, 2)]
        blocks = [(*shape, 4) for shape in shapes]
        blocks += [(8, 1, 4, 2), (4, 1, 4, 2), (8, 2, 4, 2), (4, 1, 4, 8)]
        self.candidates = [
            forward.lora.Tuning((block,), 0, splits)
            for block, splits in itertools.product(blocks, (16, 32, 64))
            if splits * block[1] * block[2] <= 256
            and 16 * splits * block[0] * block[1] * block[2] <= device.workgroup_memory
        ]

    def table(self, product: Product) -> Any:
        """Which of GPU_TUNINGS the product goes by."""
        return self.transposed

    def taken(self, product: Product, tuning: Any) -> Any:
        """The candidate that a tuning comes to at this product."""
        lora = product.lora
        columns, n_members = lora.rank, lora.n_members
        if not self.transposed:
            columns, n_members = columns * n_members, 1
        block = forward.lora.gpu_block(self.device, tuning, product.rows, columns, n_members)
        for candidate in tuning.blocks:
            one = replace(tuning, blocks=(candidate,), enough_groups=0)
            if forward.lora.gpu_block(self.device, one, product.rows, columns, n_members) == block:
                return one
        raise AssertionError("a tuning takes one of its own blocks")

    def record(self, program: Program, product: Product, tuning: forward.lora.Tuning) -> None:
        """Appends the kernel, divided so."""
        table = self.table(product)
        present = forward.lora.GPU_TUNINGS[table]
        forward.lora.GPU_TUNINGS[table] = tuning
        try:
            if self.transposed:
                lora_project_gradient(program, product.d_y, product.lora, out=product.d_z)
            else:
                lora_project(program, product.x, product.lora, out=product.z)
        finally:
            forward.lora.GPU_TUNINGS[table] = present

    def present(self, table: Any) -> Any:
        """The tuning of that key."""
        return forward.lora.GPU_TUNINGS[table]

    def rules(self) -> Iterator[forward.lora.Tuning]:
        """Tunings of two blocks, of which a product takes the first if that makes enough groups.

        The last block, for a row or two, stays as it is.
        """
        last = forward.lora.GPU_TUNINGS[self.transposed].blocks[-1]
        for splits in (16, 32, 64):
            blocks = [c.blocks[0] for c in self.candidates if c.splits == splits]
            for block in blocks:
                yield forward.lora.Tuning((block, last), 16, splits)
            for pair, enough in itertools.product(
                itertools.permutations(blocks, 2), (96, 132, 200, 300, 500)
            ):
                yield forward.lora.Tuning((*pair, last), enough, splits)


class GradientSweep:
    """d_A and d_B over how a GPU divides them; see backward.lora.Tuning."""

    name = "d_A d_B"

    def __init__(self, device: Device) -> None:
        lanes = [(8, 8), (16, 8), (16, 16), (32, 4), (32, 8), (8, 16)]
        small = [
            backward.lora.Tuning(blocks, short, splits, unroll, (4, 8))
            for (blocks, splits), short, unroll in itertools.product(lanes, (1, 2), (4, 8))
        ]
        large = [backward.lora.Tuning(n, 2, splits, 4, (8, 8)) for n, splits in lanes]
        self.candidates = [
            t
            for t in [*small, *large]
            if 4 * t.blocks * t.splits * t.sides[0] * t.sides[1] <= device.workgroup_memory
        ]

    def table(self, product: Product) -> Any:
        """The constant's name."""
        return "GPU_TUNING"

    def taken(self, product: Product, tuning: Any) -> Any:
        """The tuning itself: all products go by one."""
        return tuning

    def record(self, program: Program, product: Product, tuning: backward.lora.Tuning) -> None:
        """Appends the kernel, divided so."""
        present, backward.lora.GPU_TUNING = backward.lora.GPU_TUNING, tuning
        p = product
        try:
            lora_gradients(program, p.x, p.z, p.d_y, p.d_z, p.lora, p.gradients)
        finally:
            backward.lora.GPU_TUNING = present

    def present(self, table: Any) -> Any:
        """The tuning of all products."""
        return backward.lora.GPU_TUNING

    def rules(self) -> Iterator[backward.lora.Tuning]:
        """All candidates."""
        yield from self.candidates


Sweep = ProjectionSweep | GradientSweep


class KernelList(PlanningDevice):
    """Collects what recorded programs need compiled."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.kernels: list[tuple[str, dict[str, Any]]] = []

    def pipeline(self, template: str, constants: dict[str, Any]) -> Any:
        """Only noted."""
        self.kernels.append((template, constants))


def compiled(device: Device, product: Product, kernel: Sweep, deadline: float) -> list[Any]:
    """The candidates whose pipelines are there in time, several threads compiling; the present one
    is always among them."""
    present = kernel.taken(product, kernel.present(kernel.table(product)))

    def compile_one(candidate: Any, kernels: Sequence[tuple[str, dict[str, Any]]]) -> bool:
        if candidate != present and time.perf_counter() > deadline:
            return False
        for template, constants in kernels:
            device.pipeline(template, constants)
        return True

    candidates = list(dict.fromkeys([present, *kernel.candidates]))
    needed = []
    for candidate in candidates:
        planning = KernelList(device)
        kernel.record(Program(planning), product, candidate)
        needed.append(planning.kernels)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(compile_one, candidates, needed))
    return [candidate for candidate, there in zip(candidates, done, strict=True) if there]


def sweep(device: Device, models: list[str], rank: int, budget: float) -> list[dict[str, Any]]:
    """Times all candidates of the low-rank kernels, and prints tables and what to choose.

    Args:
        budget: seconds; products and candidates that it does not suffice for are left out.
    """
    device.is_cpu = False  # the GPU's division, on any device
    sweeps: list[Sweep] = [
        ProjectionSweep(device, False),
        ProjectionSweep(device, True),
        GradientSweep(device),
    ]
    times: dict[str, dict[str, dict[Any, float]]] = {s.name: {} for s in sweeps}
    products: dict[str, Product] = {}
    watch = Stopwatch(device)
    began = time.perf_counter()
    rows_of = {"Gemma3": 2048, "tiny": 64}
    for dtype, model, group in itertools.product(("f32", "f16"), models, MODELS["tiny"].groups()):
        late = time.perf_counter() - began > budget
        if late or (dtype == "f16" and "shader-f16" not in device.features):
            continue
        product = Product.allocate(device, model, rows_of.get(model, 512), group, dtype, rank)
        products[product.name] = product
        for kernel in sweeps:
            candidates = compiled(device, product, kernel, began + budget)
            if times[kernel.name] and len(candidates) < len(kernel.candidates):
                continue  # candidates are only compared over products that have them all
            programs = []
            for candidate in candidates:
                programs.append(Program(device))
                kernel.record(programs[-1], product, candidate)
            once = watch(programs, 1)[0]
            warm = time.perf_counter() + WARM_UP / (2 if len(products) == 1 else 10)
            while time.perf_counter() < warm:
                once = watch(programs[:1], watch.repeats(once))[0]
            rounds = [watch(programs, watch.repeats(once)) for _ in range(ROUNDS)]
            medians = map(statistics.median, zip(*rounds, strict=True))
            times[kernel.name][product.name] = dict(zip(candidates, medians, strict=True))
    for kernel in sweeps:
        report_sweep(kernel, products, times[kernel.name])
    print(f"{len(products)} products in {time.perf_counter() - began:.0f} s")
    return [
        {"kernel": kernel, "product": product, "tuning": repr(tuning), "seconds": seconds}
        for kernel, by_product in times.items()
        for product, by_tuning in by_product.items()
        for tuning, seconds in by_tuning.items()
    ]


def report_sweep(
    kernel: Sweep,
    products: dict[str, Product],
    times: dict[str, dict[Any, float]],
) -> None:
    """Prints, for each table of tunings, its candidates by their time and the best rules."""
    tables: dict[Any, list[str]] = {}
    for name in times:
        tables.setdefault(kernel.table(products[name]), []).append(name)
    for table, names in tables.items():
        present = kernel.present(table)
        taken = {name: kernel.taken(products[name], present) for name in names}
        print(f"\n{kernel.name}, {table}: µs a call; * is what is taken now")
        for index, name in enumerate(names):
            print(f"  [{index}] {name}")
        common = set.intersection(*(set(times[name]) for name in names))
        for candidate in sorted(common, key=lambda c: sum(times[name][c] for name in names)):
            cells = [
                f"{1e6 * times[name][candidate]:7.1f}{'*' if taken[name] == candidate else ' '}"
                for name in names
            ]
            print(f"  {' '.join(cells)}  {candidate}")

        def slowdown(tuning: Any, names: list[str] = names) -> float:
            """Mean over the products of the time against the best candidate's."""
            ratios = []
            for name in names:
                choice = kernel.taken(products[name], tuning)
                ratios.append(times[name].get(choice, math.inf) / min(times[name].values()))
            return statistics.mean(ratios)

        ranked = sorted(((slowdown(rule), rule) for rule in kernel.rules()), key=lambda r: r[0])
        print(f"  now {slowdown(present):.3f} of the best time: {table}: {present}")
        for ratio, rule in ranked[:3]:
            print(f"  {ratio:.3f}: {table}: {rule}")


def parse_setting(text: str) -> list[tuple[str, str, Any]]:
    """(module, constant, value) for each of the values in MODULE.NAME=V/V."""
    path, _, values = text.partition("=")
    module, _, name = path.rpartition(".")
    if not hasattr(importlib.import_module(module), name):
        raise SystemExit(f"small_kernels: {module} has no constant {name}")
    return [(module, name, ast.literal_eval(value)) for value in values.split("/")]


def main() -> None:
    """Prints a table: a line a kernel, model and number of rows; a column a choice of tunables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["SmolLM2", "Gemma3", "Llama"],
                        choices=list(MODELS))  # fmt: skip
    parser.add_argument("--rows", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the kernels' names")
    parser.add_argument("--set", action="append", default=[], dest="settings",
                        metavar="MODULE.NAME=V/V")  # fmt: skip
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--slices", type=int, help="of the gradients; 1 on a CPU adapter, else 4")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sweep", action="store_true", help="of the low-rank kernels' tunings")
    parser.add_argument("--seconds", type=float, default=60.0, help="for the sweep")
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    arguments = parser.parse_args()
    device = Device(arguments.device)
    if arguments.sweep:
        timings = sweep(device, arguments.models, arguments.rank, arguments.seconds)
        write_records(arguments.output, timings)
        return
    n_slices = arguments.slices or (1 if device.is_cpu else 4)
    choices = list(itertools.product(*map(parse_setting, arguments.settings)))
    titles = [", ".join(f"{name}={value}" for _, name, value in choice) for choice in choices]
    print(f"{device.name}; rank {arguments.rank}, {n_slices} slices; µs and GB/s a call")
    print(f"| model | rows | kernel | {' | '.join(t or 'µs' for t in titles)} | GB/s, best |")
    print(f"|{' --- |' * (4 + len(titles))}")
    records = []

    def report(model: str, rows: int | str, kernels: Iterator[Kernel]) -> None:
        for kernel in kernels:
            if not any(part in kernel.name for part in arguments.only):
                continue
            times = []
            for choice in choices:
                for module, name, value in choice:
                    setattr(importlib.import_module(module), name, value)
                times.append(seconds(device, kernel))
            cells = " | ".join(f"{1e6 * t:.1f}" for t in times)
            rate = kernel.n_bytes / min(times) / 1e9
            print(f"| {model} | {rows} | {kernel.name} | {cells} | {rate:.0f} |", flush=True)
            records.append(
                {"model": model, "rows": rows, "kernel": kernel.name, "bytes": kernel.n_bytes,
                 "seconds": dict(zip(titles, times, strict=True))}
            )  # fmt: skip

    for model in arguments.models:
        for rows in arguments.rows:
            kernels = layer_kernels(device, MODELS[model], rows, arguments.rank, n_slices)
            report(model, rows, kernels)
        report(model, "any", optimizer_kernels(device, MODELS[model], arguments.rank, n_slices))
    write_records(arguments.output, records)


def write_records(output: Path | None, records: list[dict[str, Any]]) -> None:
    """JSON to the file named, or into the folder that $OUT names."""
    if output is None and "OUT" in os.environ:
        output = Path(os.environ["OUT"]) / "small_kernels.json"
    if output is not None:
        output.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
