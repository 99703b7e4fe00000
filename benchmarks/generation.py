"""Tokens a second of text generation, and how near it comes to the memory's bandwidth.

Each new token reads every weight once: the bound is the bandwidth that reading (a sum of squares)
or copying reaches on this device, whichever is higher, over the weights' bytes. A model is a GGUF
file, or a shape: one layer of it is written with random weights and copied on the device, every
layer into memory of its own.

    python benchmarks/generation.py [--model Llama-1B Llama-8B] [--prompt 512] [--tokens 128]
        [--type Q4_0] [--precision f16] [--llama-cpp] [--sweep] [--prompt-kernels]

`--llama-cpp` measures llama.cpp beside it, on the very file (of a shape: one with all its layers is
written): its Vulkan build (tests/support/llama_vulkan.py), bare and under a random adapter; where
that can't be had, or our device is a CPU, xllamacpp's CPU build too, as its server reports it. The
first new token counts to the prompt on both sides, and both choose greedily. `--sweep` times the
products of one row under other tilings than are chosen, `--prompt-kernels` the kernels of a
prompt's last piece, too.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.llama_cpp_side import ADAPTED, BARE, RANK, REPEATS, SCALE, llama_cpp
from lora.forward.gguf.file import GGUFFile
from lora.forward.int_row import IntRow, takes_int_row
from lora.forward.matmul_int_row import IntRowTiling, matmul_int_row
from lora.forward.matmul_row import RowTiling, matmul_row
from lora.forward.model.adaptable import HEAD
from lora.forward.model.adapter import AdapterLayout
from lora.forward.model.architecture import Architecture
from lora.forward.model.frozen_model import LayerWeights, Model, load_model
from lora.forward.model.norm import Norm
from lora.forward.model.weights import FrozenMatrix
from lora.forward.product import Product
from lora.forward.text.tokenizer import Tokenizer
from lora.generation.engine import Adapter
from lora.generation.generator import TextGenerator
from lora.optim.clipping import gradient_norm
from lora.shaders.activations import extent_of
from lora.shaders.device import Device
from lora.shaders.memory import Memory
from lora.shaders.program import Dispatch, Program, encode
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor
from lora.shaders.webgpu import OpenDevice
from tests.support.tiny_gguf import add_value, tiny_tokenizer_metadata

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
WARM_UP = 0.1  # seconds
HEAD_TYPE = "Q8_0"  # of the embedding, which is the head as well
TILE_ROWS = 64  # rows of random weights that a matrix repeats
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {  # to try this script
        "n_layers": 2, "hidden_size": 256, "intermediate_size": 512, "n_heads": 8,
        "n_kv_heads": 2, "head_size": 32, "vocab_size": 320,
    },
    "SmolLM2-135M": {
        "n_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "n_heads": 9,
        "n_kv_heads": 3, "head_size": 64, "vocab_size": 49152,
    },
    "Llama-1B": {
        "n_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "n_heads": 32,
        "n_kv_heads": 8, "head_size": 64, "vocab_size": 32000,
    },
    "Llama-8B": {
        "n_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "n_heads": 32,
        "n_kv_heads": 8, "head_size": 128, "vocab_size": 32000,
    },
}  # fmt: skip


def random_rows(kind: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """Random weights of some rows, as a file holds them: of size 1 / sqrt(columns)."""
    rng, size = np.random.default_rng(seed), columns**-0.5
    tile = min(rows, TILE_ROWS)
    if kind == "Q4_K":  # gguf-py cannot quantize it: w = d · s · q - dmin · m
        blocks = rng.integers(0, 256, (tile, columns // 256, 144), np.uint8)
        scales = np.array([size / 150, size / 20], np.float16)
        blocks[:, :, :4] = scales.view(np.uint8)
        data = blocks.reshape(tile, -1)
    else:
        values = rng.normal(0, size, (tile, columns)).astype(np.float32)
        data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    return np.tile(data, (-(-rows // tile), 1))[:rows]


def write_model(path: Path, shape: dict[str, Any], kind: str, n_layers: int) -> None:
    """Writes a llama model whose layers all have the weights of one."""
    hidden, feed_forward = shape["hidden_size"], shape["intermediate_size"]
    query, kv = (shape[heads] * shape["head_size"] for heads in ("n_heads", "n_kv_heads"))
    matrices = {
        "attn_q": (query, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
        "attn_output": (hidden, query), "ffn_gate": (feed_forward, hidden),
        "ffn_up": (feed_forward, hidden), "ffn_down": (hidden, feed_forward),
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "llama.block_count": n_layers,
        "llama.context_length": 8192,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": feed_forward,
        "llama.attention.head_count": shape["n_heads"],
        "llama.attention.head_count_kv": shape["n_kv_heads"],
        "llama.attention.key_length": shape["head_size"],
        "llama.attention.value_length": shape["head_size"],
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": shape["head_size"],
        "llama.vocab_size": shape["vocab_size"],
        **tiny_tokenizer_metadata(shape["vocab_size"]),
    }.items():
        add_value(writer, key, value)

    def add(name: str, data: np.ndarray, data_kind: str) -> None:
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[data_kind])

    ones = np.ones(hidden, np.float32)
    add("token_embd.weight", random_rows(HEAD_TYPE, shape["vocab_size"], hidden, 0), HEAD_TYPE)
    add("output_norm.weight", ones, "F32")
    data = {name: random_rows(kind, *size, len(name)) for name, size in matrices.items()}
    for layer in range(n_layers):
        for name, values in data.items():
            add(f"blk.{layer}.{name}.weight", values, kind)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}.weight", ones, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def repeat_layer(recording: Recording, model: Model, n_layers: int) -> Model:
    """A model of n_layers copies of a model's only layer, each in memory of its own."""
    program = Program(recording)

    def copied(tensor: Tensor) -> Tensor:
        to = recording.memory.empty(tensor.shape, tensor.dtype, purpose="weights")
        program.copy(tensor, to)
        return to

    def copy_of(matrix: FrozenMatrix) -> FrozenMatrix:
        parts = tuple(replace(part, words=copied(part.words)) for part in matrix.parts)
        return replace(matrix, parts=parts)

    def another(layer: LayerWeights) -> LayerWeights:
        matrices = {group: copy_of(matrix) for group, matrix in layer.matrices.items()}
        return replace(layer, matrices=matrices)

    first, a = model.layers[0], model.architecture
    layers = (first, *(another(first) for _ in range(n_layers - 1)))
    program.run()
    architecture = replace(a, layers=a.layers * n_layers)
    return replace(model, architecture=architecture, layers=layers)


def matrices_of(model: Model) -> list[FrozenMatrix]:
    """The matrices that one new token reads."""
    layers = (layer.matrices.values() for layer in model.layers)
    return [model.head, *(matrix for matrices in layers for matrix in matrices)]


def warm_up(memory: Memory, programs: Sequence[Program]) -> None:
    """Runs programs for WARM_UP seconds or longer: the clocks of an idle GPU are low."""
    probe = memory.uniform()
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_UP:
        for program in programs:
            program.run()
        memory.read(probe)


def bandwidths(device: Device) -> dict[str, float]:
    """Bytes a second of copies between two large buffers (read and written) and of reading one."""
    with device.arena() as memory:
        return _bandwidths(device.recording(memory=memory))


def _bandwidths(recording: Recording) -> dict[str, float]:
    facts, memory = recording.facts, recording.memory
    n = min(facts.max_binding, (64 << 20) if facts.is_cpu else (1 << 30)) // 16 * 4
    a, b = memory.empty((n,)), memory.empty((n,))
    probe = memory.empty((64,))
    n_times = 2 if facts.is_cpu else 16
    copies, reads = Program(recording), Program(recording)
    for _ in range(n_times):
        copies.copy(a, b)
        gradient_norm(reads, [a], probe, max_norm=None)
    found = {}
    for name, program, n_bytes in (("copy", copies, 2 * a.n_bytes), ("read", reads, a.n_bytes)):
        warm_up(memory, [program])
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            program.run()
            memory.read(probe)
            times.append(time.perf_counter() - start)
        found[name] = n_bytes * n_times / min(times)
    return found


def random_adapter(recording: Recording, architecture: Architecture) -> Adapter:
    """An adapter of rank 16 on all matrices but the head, B far from zero."""
    targets = [name for name in architecture.matrices if name != HEAD.module]
    layout = AdapterLayout(architecture, range(architecture.n_layers), targets, RANK, SCALE)
    flat = recording.memory.empty_flat(layout.size, purpose="adapter")
    values = np.random.default_rng(2).normal(0, 0.01, layout.size).astype(np.float32)
    recording.memory.write(flat, values)
    return Adapter(layout, flat)


def measure(
    generator: TextGenerator, prompt: list[int], n_tokens: int, adapter: str | None
) -> dict[str, float]:
    """Tokens a second of the prompt and of what follows it, greedily."""
    prompts, speeds = [], []
    for repeat in range(REPEATS + 1):
        if repeat:
            warm_up(generator._engine._memory, step_programs(generator, adapter))
        generator.forget()
        n_new = len(list(generator.stream_ids(prompt, max_tokens=n_tokens, adapter=adapter)))
        if n_new != n_tokens:
            raise ValueError(f"{n_new} tokens came instead of {n_tokens}")
        if repeat:  # the first run compiles
            prompts.append(generator.times.prompt_speed)
            speeds.append(generator.times.speed)
    return {"prompt": statistics.median(prompts), "new": statistics.median(speeds)}


def pass_seconds(handle: OpenDevice, dispatches: Sequence[Dispatch]) -> float:
    """What dispatches take a GPU one after another in one pass, as a token's do; the best of some.

    Clocks of an idle GPU are low, and rise within a tenth of a second of work.
    """
    queries = handle.query_set(2)
    launches = [dispatch.launch for dispatch in dispatches]

    def seconds() -> float:
        encoder = handle.encoder()
        # The first pass keeps the clocks up while the second is encoded.
        for stamps in (None, (queries, 0, 1)):
            encoder.dispatches(launches, stamps)
        first, last = handle.submit_timed(encoder, queries, 2)
        return (last - first) * 1e-9

    start, best = time.perf_counter(), seconds()
    while time.perf_counter() - start < WARM_UP:
        best = min(best, seconds())
    return min(best, *(seconds() for _ in range(2 * REPEATS)))


def step_programs(generator: TextGenerator, adapter: str | None) -> tuple[Program, Program]:
    """What the GPU does for one new token: layers and head."""
    engine = generator._engine
    return engine._programs_of(adapter, engine._tensors.step)


def piece_programs(generator: TextGenerator, adapter: str | None) -> tuple[Program, Program]:
    """What the GPU did for the last piece of a prompt: layers and head."""
    engine = generator._engine
    of_pieces = adapter, engine.piece_rows
    found = [of for (*of_what, _, _), of in engine._programs.items() if (*of_what,) == of_pieces]
    return found[-1]


def kernel_table(
    generator: TextGenerator, programs: Sequence[Program]
) -> tuple[float, list[dict[str, Any]]]:
    """GPU time of programs, the last new token or piece once more, and of their kernels.

    A kernel's is by what the step is shorter without it: timed alone each would seem some 3 µs
    longer, which is much beside 5.

    Returns:
        seconds of the step; of each kernel calls, ms, GB/s of weights and TFLOP/s of what was
        recorded, the rows that are not in use and the keys that are not seen among it.
    """
    handle = generator._engine._memory.handle
    words = {
        id(part.words): part.words.n_bytes
        for matrix in matrices_of(generator._model)
        for part in matrix.parts
    }
    step = [d for program in programs for d in program.dispatches]
    kinds: dict[tuple[str, str], list[Dispatch]] = defaultdict(list)
    for dispatch in step:
        label = re.sub(r"^(layers\.\d+|head)\.", "", dispatch.label)
        kinds[dispatch.template, label].append(dispatch)
    whole, rows = pass_seconds(handle, step), []
    for (template, label), calls in kinds.items():
        rest = [dispatch for dispatch in step if not any(dispatch is call for call in calls)]
        seconds = max(whole - pass_seconds(handle, rest), 0.0)
        n_bytes = sum(words.get(id(t), 0) for call in calls for t in call.tensors)
        # The embedding reads one row of what may be the head, too.
        reads = template.startswith("matmul") and n_bytes > 0 and seconds > 0
        rows.append(
            {"kernel": template, "label": label, "calls": len(calls), "ms": 1e3 * seconds,
             "GB/s": n_bytes / seconds / 1e9 if reads else None,
             "TFLOP/s": sum(call.flops for call in calls) / seconds / 1e12 if seconds else None}
        )  # fmt: skip
    return whole, sorted(rows, key=lambda row: -row["ms"])


def sweep(device: Device, model: Model) -> list[dict[str, Any]]:
    """Microseconds of each product of one row under tilings, over the matrices of all layers."""
    first = model.layers[0]

    def all_of(group: str) -> list[FrozenMatrix]:
        return [layer.matrices[group] for layer in model.layers]

    activation = first.spec.feed_forward.activation
    cases: list[tuple[str, list[FrozenMatrix], Norm | None, str | None]] = [
        ("qkv", all_of("qkv"), first.mixer_norm, None),
        ("attn_output", all_of("attn_output"), None, None),
        ("gate_up", all_of("gate_up"), first.feed_forward_norm, activation),
        ("down", all_of("down"), None, None),
        ("logits", [model.head], model.output_norm, None),
    ]
    found = []
    for name, matrices, norm, gate in cases:
        one = matrices[0]
        for tiling in _tilings(device.recording(), one, gated=gate is not None):
            with device.arena() as memory:
                x = memory.empty((1, one.in_features), extent=memory.extent(1))
                program = Program(device.recording(memory=memory))
                for matrix in matrices:
                    _record_product(program, x, matrix, norm, gate, tiling, stores=norm is None)
                dispatches = program.dispatches
                if len(dispatches) > len(matrices):  # no block of whole numbers in a workgroup
                    continue
                seconds = pass_seconds(device.handle, dispatches) / len(matrices)
            found.append(
                {"product": name, "tiling": str(tiling or "chosen"), "us": 1e6 * seconds,
                 "GB/s": one.n_bytes / seconds / 1e9}
            )  # fmt: skip
    return found


Tiling = RowTiling | IntRowTiling


def _tilings(recording: Recording, matrix: FrozenMatrix, *, gated: bool) -> list[Tiling | None]:
    """The tilings to try; None for the one that is chosen otherwise."""
    blocks = matrix.in_features // 32
    if takes_int_row(recording, matrix):
        return [None] + [
            IntRowTiling(lanes, share, rows, steps)
            for lanes in (64, 128, 256, 512, 1024)
            for share in (8, 16, 32, 64, 128)
            for rows in (2, 4, 8)
            for steps in (1, 2, 4)
            if lanes <= recording.facts.most_lanes and rows <= share <= min(lanes, 2 * blocks)
            and rows * steps <= 8 and (steps == 1 or share * steps <= blocks)
            and lanes // share * rows % 8 == 0
        ]  # fmt: skip
    return [None] + [
        RowTiling(max(share, 64), share, quads, steps)
        for share in (32, 64, 128, 256)
        for quads in ((2,) if gated else (1, 2))
        for steps in (1, 2, 4)
        if share * steps <= 4 * blocks
    ]


def _record_product(
    program: Program, x: Tensor, matrix: FrozenMatrix, norm: Norm | None, gate: str | None,
    tiling: Tiling | None, *, stores: bool,
) -> None:  # fmt: skip
    """Appends one product as a layer has it; where no norm follows it, whole numbers come out."""
    recording, extent = program.recording, extent_of(x)
    if takes_int_row(recording, matrix):
        width = matrix.out_features // (1 if gate is None else 2)
        ints = IntRow.allocate(recording, matrix.in_features, extent).before_norm(norm)
        out = IntRow.allocate(recording, width, extent) if stores or gate else None
        matmul_int_row(
            program,
            Product(ints, matrix, gate=gate),
            int_out=out,
            tiling=tiling if isinstance(tiling, IntRowTiling) else None,
        )
    else:
        matmul_row(
            program,
            Product(x, matrix, norm=norm, gate=gate),
            tiling=tiling if isinstance(tiling, RowTiling) else None,
        )


def encode_seconds(generator: TextGenerator, adapter: str | None) -> float:
    """What the host takes to encode one new token's commands."""
    programs, times = step_programs(generator, adapter), []
    for _ in range(5):
        start = time.perf_counter()
        encode(programs)
        times.append(time.perf_counter() - start)
    return min(times)


def report(options: argparse.Namespace, name: str, results: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    n_bytes, speeds = results["weight_bytes"], results["bandwidths"]
    bandwidth = max(speeds.values())
    lines = [
        f"# Generation: {name}, prompt of {options.prompt} tokens, {options.tokens} new ones",
        "",
        f"{results['device']}, {results['version']}, {date.today()}. Greedy, one text; medians of "
        f"{REPEATS} runs. A new "
        f"token reads {n_bytes / 2**20:,.0f} MiB of weights; large reads reach "
        f"{speeds['read'] / 1e9:,.1f} GB/s, copies {speeds['copy'] / 1e9:,.1f} (read and written). "
        f"Shares are of the higher, which bounds new tokens at {bandwidth / n_bytes:,.0f}/s. In "
        f"f32 but for the weights and a prompt's products ({options.precision}); keys and values "
        "f32.",
        "",
        "| | prompt, tokens/s | new, tokens/s | weights, GB/s | share | GPU ms a token | "
        "dispatches | encoding, ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def speed(label: str, row: dict[str, Any], rest: str) -> str:
        read = row["new"] * n_bytes
        return (
            f"| {label} | {row['prompt']:,.0f} | {row['new']:,.1f} | {read / 1e9:,.1f} | "
            f"{read / bandwidth:.0%} | {rest} |"
        )

    for label, row in results["ours"].items():
        gpu = f"{row['gpu_ms']:.2f}" if "gpu_ms" in row else ""
        rest = f"{gpu} | {row['dispatches']} | {row['encode_ms']:.2f}"
        lines.append(speed(f"ours (WebGPU), {label}", row, rest))
    builds = results.get("llama.cpp", [])
    for build in builds:
        for label, row in build["rows"].items():
            lines.append(speed(f"llama.cpp ({build['backend']}), {label}", row, " | | "))
    for build in builds:
        lines += [
            "",
            f"llama.cpp {build['version']}, {build['backend']}: {build['device']}; "
            f"{build['settings']}.",
        ]
    for label, kernels in results["kernels"].items():
        lines += [
            "",
            f"GPU time of the last token by kernel ({label}), by what it takes without each:",
            "",
        ]
        lines += [
            "| kernel | label | calls | ms | GB/s of weights | share |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for kernel in kernels:
            read = kernel["GB/s"]
            shares = f"{read:,.0f} | {1e9 * read / bandwidth:.0%}" if read else " | "
            lines.append(
                f"| {kernel['kernel']} | {kernel['label']} | {kernel['calls']} | "
                f"{kernel['ms']:.3f} | {shares} |"
            )
    for label, piece in results["prompt_kernels"].items():
        lines += [
            "",
            f"GPU time of the prompt's last piece by kernel ({label}, {piece['gpu_ms']:,.1f} ms), "
            "by what it takes without each; TFLOP/s of what was recorded:",
            "",
            "| kernel | label | calls | ms | TFLOP/s |",
            "| --- | --- | --- | --- | --- |",
        ]
        for kernel in piece["kernels"]:
            flops = f"{kernel['TFLOP/s']:,.1f}" if kernel["TFLOP/s"] else ""
            lines.append(
                f"| {kernel['kernel']} | {kernel['label']} | {kernel['calls']} | "
                f"{kernel['ms']:.3f} | {flops} |"
            )
    if results["sweep"]:
        lines += ["", "Products of one row under other tilings:", ""]
        lines += [
            "| product | tiling | µs | GB/s | share |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in results["sweep"]:
            lines.append(
                f"| {row['product']} | {row['tiling']} | {row['us']:.1f} | {row['GB/s']:,.0f} | "
                f"{1e9 * row['GB/s'] / bandwidth:.0%} |"
            )
    return "\n".join(lines) + "\n"


def run(options: argparse.Namespace, device: Device, name: str, folder: Path) -> None:
    """Measures one model and writes its tables."""
    start = time.perf_counter()
    room = options.prompt + options.tokens + 1
    shape = SHAPES.get(name)
    path = Path(name)
    if shape is not None:
        path = folder / "one-layer.gguf"
        write_model(path, shape, options.type, 1)
    gguf_file = GGUFFile(path)
    recording = replace(device.recording(), products=options.precision)
    model = load_model(recording, gguf_file, Architecture.from_gguf(gguf_file), room)
    if shape is not None:
        model = repeat_layer(recording, model, shape["n_layers"])
    architecture = model.architecture
    generator = TextGenerator(
        recording, model, Tokenizer.from_gguf(gguf_file),
        {"adapter": random_adapter(recording, architecture)},
    )  # fmt: skip
    rng = np.random.default_rng(1)
    prompt = rng.integers(3, min(architecture.vocab_size, 280), options.prompt).tolist()
    project = tomllib.loads(PROJECT.read_text())["project"]
    results: dict[str, Any] = {
        "device": f"{device.facts.name}, {device.facts.info['description']}",
        "version": f"webgpu-lora {project['version']} on {device.facts.software}",
        "bandwidths": bandwidths(device),
        "weight_bytes": sum(matrix.n_bytes for matrix in matrices_of(model)),
        "ours": {},
        "kernels": {},
        "prompt_kernels": {},
        "sweep": [],
    }
    timed = "timestamp-query" in device.facts.features
    print(f"{name}: ready after {time.perf_counter() - start:.1f} s", flush=True)
    for label, adapter in ((BARE, None), (ADAPTED, "adapter")):
        row: dict[str, Any] = measure(generator, prompt, options.tokens, adapter)
        if timed:
            of_step = step_programs(generator, adapter)
            seconds, results["kernels"][label] = kernel_table(generator, of_step)
            row["gpu_ms"] = 1e3 * seconds
            if options.prompt_kernels:
                of_piece = piece_programs(generator, adapter)
                seconds, kernels = kernel_table(generator, of_piece)
                results["prompt_kernels"][label] = {"gpu_ms": 1e3 * seconds, "kernels": kernels}
        programs = step_programs(generator, adapter)
        row["dispatches"] = sum(len(program.commands) for program in programs)
        row["encode_ms"] = 1e3 * encode_seconds(generator, adapter)
        results["ours"][label] = row
        print(label, row, flush=True)
    if options.sweep and timed:
        results["sweep"] = sweep(device, model)
    if options.llama_cpp:
        if shape is not None:
            path = folder / "model.gguf"
            write_model(path, shape, options.type, shape["n_layers"])
        try:
            results["llama.cpp"] = llama_cpp(
                path, prompt, options.tokens, folder, on_cpu=device.facts.is_cpu
            )
        except RuntimeError as error:  # ours are measured: they shall not be lost
            print(f"{name}: no figures of llama.cpp: {error}", file=sys.stderr, flush=True)
    title = path.stem if shape is None else f"{name}-{options.type}"
    text = report(options, title, results)
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    stem = f"generation-{title}-{options.prompt}-{options.tokens}"
    (options.output / f"{stem}.md").write_text(text)
    (options.output / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{name}: done after {time.perf_counter() - start:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--model", nargs="+", default=["Llama-1B"], help=f"GGUF files, or of {', '.join(SHAPES)}"
    )
    parser.add_argument("--type", default="Q4_0", help="of the matrices of a shape: Q4_0, Q4_K, …")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument(
        "--precision", choices=("f32", "f16"), default="f32", help="of its products"
    )
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--llama-cpp", action="store_true")
    parser.add_argument("--sweep", action="store_true", help="other tilings of the products, too")
    parser.add_argument(
        "--prompt-kernels", action="store_true", help="times of a piece's kernels, too"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    for name in options.model:
        # A device of its own: what the last model took is given back.
        with tempfile.TemporaryDirectory() as folder, Device(options.device) as device:
            run(options, device, name, Path(folder))


if __name__ == "__main__":
    main()
