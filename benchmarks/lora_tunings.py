"""Microseconds of the low-rank kernels over how a GPU divides them, and what to choose.

z, d_z, d_A and d_B go by tables of tunings in forward/lora.py and backward/lora.py. This times
candidates for them at the products of three models in f32 and f16, and says what to write there:

    python benchmarks/lora_tunings.py [--models SmolLM2 Llama] [--seconds 60]
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.small_kernels import MODELS, random_factors, write_records
from lora.backward import lora as backward_lora
from lora.backward.lora import lora_gradients, lora_project_gradient
from lora.forward import lora as forward_lora
from lora.forward.lora import lora_project
from lora.forward.model.factors import LoraFactors
from lora.forward.plans.workbench import Stopwatch
from lora.shaders.device import Device
from lora.shaders.facts import DeviceFacts
from lora.shaders.memory import CountingMemory
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

ROUNDS, WARM_UP = 3, 0.5  # rounds over the candidates, seconds for the clocks


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
        cls, recording: Recording, model: str, rows: int, group: str, dtype: str, rank: int
    ) -> Product:
        n_in, sizes = MODELS[model].groups()[group]
        memory = recording.memory
        extent = memory.extent(rows)
        rng = np.random.default_rng(3)

        def new(width: int, dtype: str = "f32") -> Tensor:
            tensor = memory.empty((rows, width), dtype, extent=extent)
            memory.write(tensor, rng.random(tensor.shape, np.float32))
            return tensor

        width = len(sizes) * rank
        return cls(
            f"{model} {rows} {group} {dtype}",
            rows,
            random_factors(recording, n_in, sizes, rank),
            [random_factors(recording, n_in, sizes, rank) for _ in range(backward_lora.MAX_SLICES)],
            new(n_in, dtype),
            new(sum(sizes), dtype),
            new(width),
            new(width),
        )


class ProjectionSweep:
    """z (`transposed` False) or d_z over how a GPU divides it; see forward_lora.Tuning."""

    def __init__(self, recording: Recording, transposed: bool) -> None:
        self.recording, self.transposed = recording, transposed
        self.name = "d_z" if transposed else "z"
        shapes = [(8, 1, 4), (4, 1, 4), (2, 1, 4), (4, 2, 4), (8, 2, 4), (8, 1, 2), (4, 1, 2)]
        blocks = [(*shape, 4) for shape in shapes]
        blocks += [(8, 1, 4, 2), (4, 1, 4, 2), (8, 2, 4, 2), (4, 1, 4, 8)]
        self.candidates = [
            forward_lora.Tuning((block,), 0, splits)
            for block, splits in itertools.product(blocks, (16, 32, 64))
            if splits * block[1] * block[2] <= 256
            and 16 * splits * block[0] * block[1] * block[2] <= recording.facts.workgroup_memory
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

        def block_of(tuning: Any) -> Any:
            return forward_lora.gpu_block(self.recording, tuning, product.rows, columns, n_members)

        block = block_of(tuning)
        for candidate in tuning.blocks:
            one = replace(tuning, blocks=(candidate,), enough_groups=0)
            if block_of(one) == block:
                return one
        raise AssertionError("a tuning takes one of its own blocks")

    def record(self, program: Program, product: Product, tuning: forward_lora.Tuning) -> None:
        """Appends the kernel, divided so."""
        table = self.table(product)
        present = forward_lora.GPU_TUNINGS[table]
        forward_lora.GPU_TUNINGS[table] = tuning
        try:
            if self.transposed:
                lora_project_gradient(program, product.d_y, product.lora, out=product.d_z)
            else:
                lora_project(program, product.x, product.lora, out=product.z)
        finally:
            forward_lora.GPU_TUNINGS[table] = present

    def present(self, table: Any) -> Any:
        """The tuning of that key."""
        return forward_lora.GPU_TUNINGS[table]

    def rules(self) -> Iterator[forward_lora.Tuning]:
        """Tunings of two blocks, of which a product takes the first if that makes enough groups.

        The last block, for a row or two, stays as it is.
        """
        last = forward_lora.GPU_TUNINGS[self.transposed].blocks[-1]
        for splits in (16, 32, 64):
            blocks = [c.blocks[0] for c in self.candidates if c.splits == splits]
            for block in blocks:
                yield forward_lora.Tuning((block, last), 16, splits)
            for pair, enough in itertools.product(
                itertools.permutations(blocks, 2), (96, 132, 200, 300, 500)
            ):
                yield forward_lora.Tuning((*pair, last), enough, splits)


class GradientSweep:
    """d_A and d_B over how a GPU divides them; see backward_lora.Tuning."""

    name = "d_A d_B"

    def __init__(self, facts: DeviceFacts) -> None:
        lanes = [(8, 8), (16, 8), (16, 16), (32, 4), (32, 8), (8, 16)]
        small = [
            backward_lora.Tuning(blocks, short, splits, unroll, (4, 8))
            for (blocks, splits), short, unroll in itertools.product(lanes, (1, 2), (4, 8))
        ]
        large = [backward_lora.Tuning(n, 2, splits, 4, (8, 8)) for n, splits in lanes]
        self.candidates = [
            t
            for t in [*small, *large]
            if 4 * t.blocks * t.splits * t.sides[0] * t.sides[1] <= facts.workgroup_memory
        ]

    def table(self, product: Product) -> Any:
        """The constant's name."""
        return "GPU_TUNING"

    def taken(self, product: Product, tuning: Any) -> Any:
        """The tuning itself: all products go by one."""
        return tuning

    def record(self, program: Program, product: Product, tuning: backward_lora.Tuning) -> None:
        """Appends the kernel, divided so."""
        present, backward_lora.GPU_TUNING = backward_lora.GPU_TUNING, tuning
        p = product
        try:
            lora_gradients(program, p.x, p.z, p.d_y, p.d_z, p.lora, p.gradients)
        finally:
            backward_lora.GPU_TUNING = present

    def present(self, table: Any) -> Any:
        """The tuning of all products."""
        return backward_lora.GPU_TUNING

    def rules(self) -> Iterator[backward_lora.Tuning]:
        """All candidates."""
        yield from self.candidates


Sweep = ProjectionSweep | GradientSweep


def compiled(recording: Recording, product: Product, kernel: Sweep, deadline: float) -> list[Any]:
    """The candidates whose pipelines are there in time, several threads compiling; the present one
    is always among them."""
    present = kernel.taken(product, kernel.present(kernel.table(product)))

    def compile_one(candidate: Any, kernels: Sequence[tuple[str, dict[str, Any]]]) -> bool:
        if candidate != present and time.perf_counter() > deadline:
            return False
        for template, constants in kernels:
            recording.memory.kernel(template, constants)
        return True

    candidates = list(dict.fromkeys([present, *kernel.candidates]))
    counting = replace(recording, memory=CountingMemory(recording.facts))
    needed = []
    for candidate in candidates:
        program = Program(counting)
        kernel.record(program, product, candidate)
        needed.append([(d.template, dict(d.constants)) for d in program.dispatches])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(compile_one, candidates, needed))
    return [candidate for candidate, there in zip(candidates, done, strict=True) if there]


def sweep(device: Device, models: list[str], rank: int, budget: float) -> list[dict[str, Any]]:
    """Times all candidates of the low-rank kernels, and prints tables and what to choose.

    Args:
        budget: seconds; products and candidates that it does not suffice for are left out.
    """
    facts = replace(device.facts, is_cpu=False)  # the GPU's division, on any device
    recording = replace(device.recording(), facts=facts)
    sweeps: list[Sweep] = [
        ProjectionSweep(recording, False),
        ProjectionSweep(recording, True),
        GradientSweep(facts),
    ]
    times: dict[str, dict[str, dict[Any, float]]] = {s.name: {} for s in sweeps}
    products: dict[str, Product] = {}
    watch = Stopwatch(device)
    began = time.perf_counter()
    rows_of = {"Gemma3": 2048, "tiny": 64}
    for dtype, model, group in itertools.product(("f32", "f16"), models, MODELS["tiny"].groups()):
        late = time.perf_counter() - began > budget
        if late or (dtype == "f16" and "shader-f16" not in facts.features):
            continue
        product = Product.allocate(recording, model, rows_of.get(model, 512), group, dtype, rank)
        products[product.name] = product
        for kernel in sweeps:
            candidates = compiled(recording, product, kernel, began + budget)
            if times[kernel.name] and len(candidates) < len(kernel.candidates):
                continue  # candidates are only compared over products that have them all
            programs = []
            for candidate in candidates:
                programs.append(Program(recording))
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


def main() -> None:
    """Prints each table of tunings, its candidates by their time, and the best rules."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["SmolLM2", "Gemma3", "Llama"],
                        choices=list(MODELS))  # fmt: skip
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    arguments = parser.parse_args()
    timings = sweep(Device(arguments.device), arguments.models, arguments.rank, arguments.seconds)
    write_records(arguments.output, timings, "lora_tunings")


if __name__ == "__main__":
    main()
