"""llama.cpp's side of generation.py: its Vulkan build, and xllamacpp's CPU build in a process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from lora.forward.gguf.file import GGUFFile
from tests.support.llama_vulkan import LlamaVulkan, NoLlamaVulkan

RANK, SCALE = 16, 2.0
BARE, ADAPTED = "bare", f"adapter, r={RANK}"
REPEATS = 3


def write_adapter(path: Path, base: GGUFFile) -> None:
    """Writes a random GGUF adapter of rank RANK on all matrices of the layers."""
    rng = np.random.default_rng(2)
    writer = gguf.GGUFWriter(path, base.metadata["general.architecture"])
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", RANK * SCALE)
    for tensor in base.tensors.values():
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            rows, columns = tensor.shape
            for factor, size in (("lora_a", (RANK, columns)), ("lora_b", (rows, RANK))):
                values = rng.normal(0, 0.01, size).astype(np.float32)
                writer.add_tensor(f"{tensor.name}.{factor}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(
    model: Path, prompt: list[int], n_tokens: int, folder: Path, *, on_cpu: bool
) -> list[dict[str, Any]]:
    """The same with llama.cpp: its Vulkan build, and where that can't be had, its CPU build.

    Args:
        folder: takes an adapter's file.
        on_cpu: our own device is a CPU: llama.cpp's CPU build is measured as well.
    """
    adapter = folder / "adapter.gguf"
    write_adapter(adapter, GGUFFile(model))
    builds: list[dict[str, Any]] = []

    def add(backend: str, settings: str, rows: dict[str, dict[str, Any]]) -> None:
        print(f"llama.cpp ({backend})", rows, flush=True)
        about = {key: rows[BARE][key] for key in ("device", "version")}
        builds.append({"backend": backend, **about, "settings": settings, "rows": rows})

    try:
        rows = {
            label: LlamaVulkan(model, file).speeds(prompt, n_tokens, REPEATS)
            for label, file in ((BARE, None), (ADAPTED, adapter))
        }
        add("Vulkan", "keys and values f16, flash attention where it chooses to", rows)
    except NoLlamaVulkan as reason:
        print(f"llama.cpp (Vulkan): {reason}", flush=True)
    if on_cpu or not builds:
        rows = {BARE: xllamacpp_speeds(model, prompt, n_tokens)}
        add("CPU", "the defaults of xllamacpp's server", rows)
    return builds


def xllamacpp_speeds(model: Path, prompt: list[int], n_tokens: int) -> dict[str, Any]:
    """xllamacpp's, in a process of its own: its threads don't end."""
    asked = {"model": str(model), "prompt": prompt, "n_tokens": n_tokens}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(asked), text=True, capture_output=True, timeout=600,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"llama.cpp failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def serve_xllamacpp() -> None:
    """What `xllamacpp_speeds` starts: settings on stdin, one line of JSON as the answer."""
    import xllamacpp

    asked = json.load(sys.stdin)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = asked["model"]
    parameters.n_ctx = len(asked["prompt"]) + asked["n_tokens"] + 64
    parameters.n_parallel = 1
    parameters.port = 0
    parameters.verbosity = 0
    parameters.n_gpu_layers = 0
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
        "device": ", ".join(str(d.get("description")) for d in xllamacpp.get_device_info()),
        "version": f"xllamacpp {version('xllamacpp')}",
    }
    print(json.dumps(result), flush=True)
    os._exit(0)


if __name__ == "__main__":
    serve_xllamacpp()
