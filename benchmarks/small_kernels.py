"""Microseconds and GB/s of every kernel that is no matmul and no attention, over its tunables.

A kernel's tunables are the constants of its module; `--set` gives one another value, and several
values (separated by `/`) a column each, so that one run compares them:

    python benchmarks/small_kernels.py [--models SmolLM2] [--rows 128 512] [--only rmsnorm]
        [--set lora.forward.rmsnorm.GPU_QUADS=1/2/4]

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
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora.forward.model.norm import HeadNorms, Norm

sys.path.insert(0, str(Path(__file__).parent.parent))

from lora.backward.head_norm_rope import head_norm_rope_backward
from lora.backward.lora import lora_gradients, lora_project_gradient
from lora.backward.rmsnorm import rmsnorm_backward
from lora.backward.swiglu import swiglu_backward
from lora.forward.cross_entropy import cross_entropy
from lora.forward.decoder.head import chunk_size
from lora.forward.head_norm_rope import head_norm_rope
from lora.forward.heads import Heads, Rotation
from lora.forward.lora import lora_project
from lora.forward.model.factors import LoraFactors
from lora.forward.model.rope_frequencies import Rope
from lora.forward.rmsnorm import rmsnorm
from lora.forward.rope import rope
from lora.forward.swiglu import swiglu
from lora.optim.adamw import AdamWSettings, AdamWTensors, adamw, step_words
from lora.optim.clipping import gradient_norm
from lora.shaders.device import Device
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

REPEATS = 20
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
    recording: Recording, shape: Shape, rows: int, rank: int, n_slices: int
) -> Iterator[Kernel]:
    """The kernels over the rows of a micro-batch."""
    extent = recording.memory.extent(rows)
    rng = np.random.default_rng(0)

    def new(*sizes: int) -> Tensor:
        tensor = recording.memory.empty((rows, *sizes), extent=extent)
        recording.memory.write(tensor, rng.standard_normal(tensor.shape, np.float32))
        return tensor

    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, kv = shape.n_heads * shape.head_size, shape.n_kv_heads * shape.head_size
    x, d_y, residual, out = (new(hidden) for _ in range(4))
    norm = Norm(recording.memory.upload(np.ones(hidden, np.float32)), EPSILON)
    one = x.n_bytes
    yield Kernel("rmsnorm", lambda p: rmsnorm(p, x, norm, out=out), 2 * one)
    yield Kernel(
        "rmsnorm_backward",
        lambda p: rmsnorm_backward(p, x, norm, d_y, residual=residual, out=residual),
        4 * one,
    )
    qkv, d_qkv = new(query + 2 * kv), new(query + 2 * kv)
    positions = recording.memory.empty((rows,), "u32", extent=extent)
    recording.memory.write(positions, np.arange(rows, dtype=np.uint32))
    if shape.qk_norm:
        heads = Heads(shape.n_heads, shape.n_kv_heads, shape.head_size, scale=1.0)
        w = recording.memory.upload(np.ones(shape.head_size, np.float32))
        turns = recording.memory.upload(
            Rope(10000.0, shape.head_size, interleaved=False).tables(rows)
        )
        norms, rotation = (
            HeadNorms(Norm(w, EPSILON), Norm(w, EPSILON)),
            Rotation(positions, turns, interleaved=False),
        )
        yield Kernel(
            "head_norm_rope",
            lambda p: head_norm_rope(p, qkv, norms, rotation, heads, out=d_qkv),
            2 * qkv.n_bytes,
        )
        yield Kernel(
            "head_norm_rope_backward",
            lambda p: head_norm_rope_backward(p, qkv, norms, rotation, heads, d_qkv),
            3 * 4 * rows * (query + kv),
        )
    for interleaved in (True, False):
        tables = recording.memory.upload(Rope(10000.0, shape.head_size, interleaved).tables(rows))
        yield Kernel(
            "rope interleaved" if interleaved else "rope halves",
            lambda p, tables=tables, interleaved=interleaved: rope(  # type: ignore[misc]
                p, qkv, Rotation(positions, tables, interleaved),
                shape.n_heads + shape.n_kv_heads, shape.head_size,
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
        lora = random_factors(recording, n_in, sizes, rank)
        source, d_output = new(n_in), new(sum(sizes))
        gradients = [random_factors(recording, n_in, sizes, rank) for _ in range(n_slices)]
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
    yield from head_kernels(recording, shape, rows)


def random_factors(
    recording: Recording, in_features: int, sizes: list[int], rank: int
) -> LoraFactors:
    """Factors that lie behind each other in one buffer, as the trainer's do."""
    n_a, n_b = len(sizes) * rank * in_features, sum(sizes) * rank
    first = -(-n_a // 64) * 64
    rng = np.random.default_rng(1)
    flat = recording.memory.upload(0.01 * rng.standard_normal(first + n_b, np.float32))
    stops = list(itertools.accumulate(sizes))
    return LoraFactors(
        flat.slice(0, n_a).reshape(len(sizes) * rank, in_features),
        flat.slice(first, first + n_b).reshape(sum(sizes), rank),
        rank,
        1.0,
        tuple((stop - size, stop) for stop, size in zip(stops, sizes, strict=True)),
    )


def head_kernels(recording: Recording, shape: Shape, rows: int) -> Iterator[Kernel]:
    """Cross-entropy over a chunk of logits, as large as the head makes them."""
    chunk = min(rows, chunk_size(recording, shape.vocab_size, rows))
    extent = recording.memory.extent(chunk)
    rng = np.random.default_rng(2)
    logits = recording.memory.empty((chunk, shape.vocab_size), extent=extent)
    recording.memory.write(logits, rng.standard_normal(logits.shape, np.float32))
    labels = recording.memory.empty((chunk,), "u32", extent=extent)
    recording.memory.write(labels, rng.integers(0, shape.vocab_size, chunk))
    losses, correct = (recording.memory.empty((chunk,), extent=extent) for _ in range(2))
    equal = recording.memory.empty((chunk,), extent=extent)
    recording.memory.write(equal, np.full(chunk, 1 / chunk))
    for name, weights, passes in (("cross_entropy", equal, 3), ("cross_entropy loss", None, 1)):
        yield Kernel(
            f"{name} {chunk} rows",
            lambda p, weights=weights: cross_entropy(  # type: ignore[misc]
                p, logits, labels, losses, correct, weights
            ),
            passes * logits.n_bytes,
        )


def optimizer_kernels(
    recording: Recording, shape: Shape, rank: int, n_slices: int
) -> Iterator[Kernel]:
    """Norm, clip factor and AdamW over all parameters of an adapter on every linear layer."""
    query, kv = shape.n_heads * shape.head_size, shape.n_kv_heads * shape.head_size
    hidden, inner = shape.hidden_size, shape.intermediate_size
    sizes = [(hidden, query), (hidden, kv), (hidden, kv), (query, hidden), (hidden, inner),
             (hidden, inner), (inner, hidden)]  # fmt: skip
    n = -(-shape.n_layers * rank * sum(map(sum, sizes)) // 64) * 64
    slices = [recording.memory.empty_flat(n, purpose="gradients") for _ in range(n_slices)]
    parameters, first, second = (
        recording.memory.empty_flat(n, purpose="optimizer") for _ in range(3)
    )
    state, step = recording.memory.empty((4,)), recording.memory.uniform()
    recording.memory.write(step, step_words(1e-4, 1, (0.9, 0.999)))
    yield Kernel(
        "gradient_norm",
        lambda p: gradient_norm(p, slices, state, max_norm=1.0),
        4 * n * (n_slices + (n_slices > 1)),
    )
    yield Kernel(
        "adamw",
        lambda p: adamw(
            p, AdamWTensors(parameters, slices[0], first, second), state, step,
            AdamWSettings((0.9, 0.999), 1e-8, 0.0),
        ),
        4 * n * 7,
    )  # fmt: skip


def seconds(recording: Recording, kernel: Kernel) -> float:
    """The median of one call's time on the device."""
    program = Program(recording)
    for _ in range(REPEATS):
        kernel.record(program)
    program.run()
    times = [t.seconds for t in program.time()]
    n = len(times) // REPEATS
    return statistics.median(sum(times[i : i + n]) for i in range(0, len(times), n))


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
    parser.add_argument("--slices", type=int, help="of the gradients; 1 on a CPU device, else 4")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    arguments = parser.parse_args()
    device = Device(arguments.device)
    n_slices = arguments.slices or (1 if device.facts.is_cpu else 4)
    choices = list(itertools.product(*map(parse_setting, arguments.settings)))
    titles = [", ".join(f"{name}={value}" for _, name, value in choice) for choice in choices]
    print(f"{device.facts.name}; rank {arguments.rank}, {n_slices} slices; µs and GB/s a call")
    print(f"| model | rows | kernel | {' | '.join(t or 'µs' for t in titles)} | GB/s, best |")
    print(f"|{' --- |' * (4 + len(titles))}")
    records = []

    def report(
        recording: Recording, model: str, rows: int | str, kernels: Iterator[Kernel]
    ) -> None:
        for kernel in kernels:
            if not any(part in kernel.name for part in arguments.only):
                continue
            times = []
            for choice in choices:
                for module, name, value in choice:
                    setattr(importlib.import_module(module), name, value)
                times.append(seconds(recording, kernel))
            cells = " | ".join(f"{1e6 * t:.1f}" for t in times)
            rate = kernel.n_bytes / min(times) / 1e9
            print(f"| {model} | {rows} | {kernel.name} | {cells} | {rate:.0f} |", flush=True)
            records.append(
                {"model": model, "rows": rows, "kernel": kernel.name, "bytes": kernel.n_bytes,
                 "seconds": dict(zip(titles, times, strict=True))}
            )  # fmt: skip

    for model in arguments.models:
        for rows in arguments.rows:
            with device.arena() as memory:
                recording = device.recording(memory=memory)
                kernels = layer_kernels(recording, MODELS[model], rows, arguments.rank, n_slices)
                report(recording, model, rows, kernels)
        with device.arena() as memory:
            recording = device.recording(memory=memory)
            kernels = optimizer_kernels(recording, MODELS[model], arguments.rank, n_slices)
            report(recording, model, "any", kernels)
    write_records(arguments.output, records, "small_kernels")


def write_records(output: Path | None, records: list[dict[str, Any]], name: str) -> None:
    """JSON to the file given, or to one of that name in the folder that $OUT names."""
    if output is None and "OUT" in os.environ:
        output = Path(os.environ["OUT"]) / f"{name}.json"
    if output is not None:
        output.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
