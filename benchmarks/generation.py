"""Tokens a second of text generation, and how near it comes to the memory's bandwidth.

Each new token reads every weight once: the bound is the bandwidth that reading (a sum of squares)
or copying reaches on this device, whichever is higher, over the weights' bytes. A model is a GGUF
file, or a shape that is written with random weights: those of one layer, stored once for each,
which takes as long to read and less to make.

    python benchmarks/generation.py [--model Llama-1B] [--prompt 512] [--tokens 128] [--llama-cpp]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from forward.adapter import AdapterLayout
from forward.architecture import HEAD, Architecture
from forward.gguf_file import GGUFFile
from forward.model import Model, load_model
from forward.tokenizer import Tokenizer
from lora.generation import Adapter, TextGenerator
from optim.clipping import gradient_norm
from shaders.device import Device
from shaders.program import Program
from tests.forward.tiny_gguf import add_value, write_tiny_llama

RANK, SCALE = 16, 2.0
REPEATS = 3
WARM_UP = 0.1  # seconds
TYPES = {"weight": "Q4_0", "token_embd.weight": "Q8_0", "norm.weight": "F32"}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"n_layers": 2, "vocab_size": 320},  # to try this script
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
    "Llama-8B-quarter": {  # eight layers of it: quick to load
        "n_layers": 8, "hidden_size": 4096, "intermediate_size": 14336, "n_heads": 32,
        "n_kv_heads": 8, "head_size": 128, "vocab_size": 32000,
    },
}  # fmt: skip


def write_model(path: Path, shape: dict[str, Any]) -> None:
    """Writes a llama model whose layers all have the weights of one."""
    one = path.with_name("one-layer.gguf")
    write_tiny_llama(one, **{**shape, "n_layers": 1}, types=TYPES)
    source = GGUFFile(one)
    writer = gguf.GGUFWriter(path, "llama")
    changes = {"llama.block_count": shape["n_layers"], "llama.context_length": 8192}
    for key, value in (source.metadata | changes).items():
        if key != "general.architecture" and not key.startswith("GGUF."):
            add_value(writer, key, value)
    for name, tensor in source.tensors.items():
        data = tensor.data.reshape(-1) if len(tensor.shape) == 1 else tensor.data
        for layer in range(shape["n_layers"] if name.startswith("blk.0.") else 1):
            writer.add_tensor(name.replace("blk.0.", f"blk.{layer}."), data, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weight_bytes(model: Model) -> int:
    """Bytes of the matrices that one new token reads."""
    matrices = [model.head]
    for layer in model.layers:
        matrices += [layer.qkv, layer.attn_output, layer.gate_up, layer.down]
    return sum(matrix.n_bytes for matrix in matrices)


def warm_up(device: Device, programs: Sequence[Program]) -> None:
    """Runs programs for WARM_UP seconds or longer: the clocks of an idle GPU are low."""
    probe = device.empty((64,))
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_UP:
        for program in programs:
            program.run()
        device.read(probe)


def bandwidths(device: Device) -> dict[str, float]:
    """Bytes a second of copies between two large buffers (read and written) and of reading one."""
    n = min(device.max_binding, (64 << 20) if device.is_cpu else (1 << 30)) // 16 * 4
    a, b = device.empty((n,)), device.empty((n,))
    probe = device.empty((64,))
    n_times = 2 if device.is_cpu else 16
    copies, reads = Program(device), Program(device)
    for _ in range(n_times):
        copies.copy(a, b)
        gradient_norm(reads, [a], probe, max_norm=None)
    found = {}
    for name, program, n_bytes in (("copy", copies, 2 * a.n_bytes), ("read", reads, a.n_bytes)):
        warm_up(device, [program])
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            program.run()
            device.read(probe)
            times.append(time.perf_counter() - start)
        found[name] = n_bytes * n_times / min(times)
    return found


def random_adapter(device: Device, architecture: Architecture) -> Adapter:
    """An adapter of rank 16 on all matrices but the head, B far from zero."""
    targets = [name for name in architecture.matrices if name != HEAD.module]
    layout = AdapterLayout(architecture, range(architecture.n_layers), targets, RANK, SCALE)
    flat = device.empty_flat(layout.size, purpose="adapter")
    values = np.random.default_rng(2).normal(0, 0.01, layout.size).astype(np.float32)
    device.write(flat, values)
    return Adapter(layout, flat)


def measure(
    generator: TextGenerator, prompt: list[int], n_tokens: int, adapter: str | None
) -> dict[str, float]:
    """Tokens a second of the prompt and of what follows it, greedily."""
    prompts, speeds = [], []
    for repeat in range(REPEATS + 1):
        if repeat:
            warm_up(generator._device, generator._programs_of(adapter, generator._step))
        generator.forget()
        n_new = len(list(generator.stream_ids(prompt, max_tokens=n_tokens, adapter=adapter)))
        if n_new != n_tokens:
            raise ValueError(f"{n_new} tokens came instead of {n_tokens}")
        if repeat:  # the first run compiles
            prompts.append(generator.times.prompt_speed)
            speeds.append(generator.times.speed)
    return {"prompt": statistics.median(prompts), "new": statistics.median(speeds)}


def kernel_table(generator: TextGenerator, adapter: str | None) -> list[dict[str, Any]]:
    """GPU time of one new token by kernel, the last step once more: calls, ms, GB/s of weights."""
    layers, head = generator._programs_of(adapter, generator._step)
    words = {
        id(part.words): part.words.n_bytes
        for matrix in _matrices(generator._model)
        for part in matrix.parts
    }
    rows: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0])
    for program in (layers, head):
        warm_up(generator._device, [program])
        best: list[float] | None = None
        for _ in range(REPEATS + 1):
            kernels = program.time()
            seconds = [kernel.seconds for kernel in kernels]
            best = seconds if best is None else list(map(min, best, seconds))
        dispatches = [c for c in program.commands if hasattr(c, "template")]
        for command, seconds_, kernel in zip(dispatches, best or [], kernels, strict=True):
            row = rows[kernel.template, kernel.label.split(".")[-1]]
            row[0] += 1
            row[1] += seconds_
            if kernel.template == "matmul_row":
                row[2] += sum(words.get(id(t), 0) for t in command.tensors)
    return [
        {"kernel": template, "label": label, "calls": calls, "ms": 1e3 * seconds,
         "GB/s": n_bytes / seconds / 1e9 if n_bytes else None}
        for (template, label), (calls, seconds, n_bytes) in sorted(
            rows.items(), key=lambda item: -item[1][1]
        )
    ]  # fmt: skip


def _matrices(model: Model) -> list[Any]:
    layers = [[layer.qkv, layer.attn_output, layer.gate_up, layer.down] for layer in model.layers]
    return [model.head, *(matrix for layer in layers for matrix in layer)]


def encode_seconds(generator: TextGenerator, adapter: str | None) -> float:
    """What the host takes to encode one new token's commands."""
    times = []
    for _ in range(5):
        encoder = generator._device.wgpu.create_command_encoder()
        start = time.perf_counter()
        for program in generator._programs_of(adapter, generator._step):
            program.encode(encoder)
        times.append(time.perf_counter() - start)
        encoder.finish()
    return min(times)


def llama_cpp(model: Path, prompt: list[int], n_tokens: int) -> dict[str, Any]:
    """The same with xllamacpp, in a process of its own: its threads don't end."""
    asked = {"model": str(model), "prompt": prompt, "n_tokens": n_tokens}
    done = subprocess.run(
        [sys.executable, __file__, "--serve-llama-cpp"],
        input=json.dumps(asked), text=True, capture_output=True, timeout=600,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"llama.cpp failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def serve_llama_cpp() -> None:
    """The process that `llama_cpp` starts: settings on stdin, one line of JSON as the answer."""
    import xllamacpp

    asked = json.load(sys.stdin)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = asked["model"]
    parameters.n_ctx = len(asked["prompt"]) + asked["n_tokens"] + 64
    parameters.n_parallel = 1
    parameters.port = 0
    parameters.verbosity = 0
    parameters.n_gpu_layers = 999
    server = xllamacpp.Server(parameters)
    found = []
    for _ in range(REPEATS + 1):
        answer = server.handle_completions(
            {"prompt": asked["prompt"], "max_tokens": asked["n_tokens"], "temperature": 0.0,
             "cache_prompt": False, "ignore_eos": True}
        )  # fmt: skip
        if isinstance(answer, list):
            answer = answer[-1]
        found.append(answer["timings"])
    timings = found[1:]
    result = {
        "prompt": statistics.median(t["prompt_per_second"] for t in timings),
        "new": statistics.median(t["predicted_per_second"] for t in timings),
        "devices": [str(d.get("name")) for d in xllamacpp.get_device_info()],
    }
    print(json.dumps(result), flush=True)
    os._exit(0)


def report(options: argparse.Namespace, results: dict[str, Any]) -> str:
    """The table, as Markdown."""
    bound, n_bytes, speeds = results["bound"], results["weight_bytes"], results["bandwidths"]
    lines = [
        f"# Generation: {Path(options.model).name}, prompt of {options.prompt} tokens, "
        f"{options.tokens} new ones",
        "",
        f"{results['device']}, {date.today()}. Greedy, one text; medians of {REPEATS} runs. A new "
        f"token reads {n_bytes / 2**20:,.0f} MiB of weights; large reads reach "
        f"{speeds['read'] / 1e9:,.1f} GB/s, copies {speeds['copy'] / 1e9:,.1f} (read and written); "
        f"the higher bounds new tokens at {bound:,.0f}/s. In f32 but for the weights; keys and "
        "values f32.",
        "",
        "| | prompt, tokens/s | new, tokens/s | of the bound | GPU ms a token | encoding, ms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in results["ours"].items():
        lines.append(
            f"| {name} | {row['prompt']:,.0f} | {row['new']:,.1f} | {row['new'] / bound:.0%} | "
            f"{row['gpu_ms']:.2f} | {row['encode_ms']:.2f} |"
        )
    if "llama.cpp" in results:
        row = results["llama.cpp"]
        devices = ", ".join(row["devices"])
        lines.append(
            f"| llama.cpp ({devices}) | {row['prompt']:,.0f} | {row['new']:,.1f} | "
            f"{row['new'] / bound:.0%} | | |"
        )
    for name, kernels in results["kernels"].items():
        lines += ["", f"GPU time of the last token by kernel ({name}):", ""]
        lines += [
            "| kernel | label | calls | ms | GB/s of weights |",
            "| --- | --- | --- | --- | --- |",
        ]
        for kernel in kernels:
            speed = f"{kernel['GB/s']:,.0f}" if kernel["GB/s"] else ""
            lines.append(
                f"| {kernel['kernel']} | {kernel['label']} | {kernel['calls']} | "
                f"{kernel['ms']:.3f} | {speed} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="Llama-1B", help=f"a GGUF, or {', '.join(SHAPES)}")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--llama-cpp", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--serve-llama-cpp", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_llama_cpp:
        serve_llama_cpp()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.model)
        if options.model in SHAPES:
            path = Path(folder) / "model.gguf"
            write_model(path, SHAPES[options.model])
        gguf_file = GGUFFile(path)
        architecture = Architecture.from_gguf(gguf_file)
        device = Device(options.device)
        room = options.prompt + options.tokens + 1
        model = load_model(device, gguf_file, architecture, room)
        generator = TextGenerator(
            device, model, Tokenizer.from_gguf(gguf_file),
            {"adapter": random_adapter(device, architecture)},
        )  # fmt: skip
        rng = np.random.default_rng(1)
        prompt = rng.integers(3, min(architecture.vocab_size, 280), options.prompt).tolist()
        speeds, n_bytes = bandwidths(device), weight_bytes(model)
        results: dict[str, Any] = {
            "device": f"{device.name}, {device.info['description']}",
            "bandwidths": speeds,
            "weight_bytes": n_bytes,
            "bound": max(speeds.values()) / n_bytes,
            "ours": {},
            "kernels": {},
        }
        for name, adapter in (("bare", None), (f"adapter, r={RANK}", "adapter")):
            row = measure(generator, prompt, options.tokens, adapter)
            if "timestamp-query" in device.features:
                results["kernels"][name] = kernel_table(generator, adapter)
            row["gpu_ms"] = sum(k["ms"] for k in results["kernels"].get(name, []))
            row["encode_ms"] = 1e3 * encode_seconds(generator, adapter)
            results["ours"][name] = row
            print(name, row, flush=True)
        if options.llama_cpp:
            results["llama.cpp"] = llama_cpp(path, prompt, options.tokens)
    text = report(options, results)
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    name = f"generation-{Path(options.model).stem}-{options.prompt}-{options.tokens}"
    (options.output / f"{name}.md").write_text(text)
    (options.output / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
