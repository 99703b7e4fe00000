"""A training step of ours against Hugging Face PEFT's on the same GPU, in one run.

The model has a real one's shape and tensor types with random weights (benchmarks/synthetic.py), so
that the file need not travel; transformers loads the very same GGUF. Both sides train LoRA r=16 on
all linear layers with AdamW and clipping on the same random rows, and their losses are printed side
by side. PEFT runs eager, as its users run it, with and without gradient checkpointing.

    python benchmarks/vs_peft.py [--model SmolLM2-135M] [--rows 1] [--length 512] [--output DIR]
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.synthetic import SHAPES, write_model
from lora.config import Config
from lora.data import Example
from lora.profiling import KernelRow, kernel_table
from lora.session import TrainingSession

RANK, ALPHA = 16, 32.0
LEARNING_RATE = 1e-4
WARM_UP, STEPS = 5, 20


def ours(
    model: Path, rows: list[np.ndarray], batch_size: int, directory: Path, recompute: str
) -> tuple[dict[str, Any], TrainingSession]:
    """Times our steps; leaves the untrained adapter in `directory` for PEFT to start from."""
    config = Config.model_validate(
        {
            "model": {"path": str(model)},
            "adapter": {"rank": RANK, "alpha": ALPHA},
            "data": {"train": "none", "max_length": len(rows[0])},
            "train": {
                "steps": WARM_UP + STEPS,
                "batch_size": batch_size,
                "learning_rate": LEARNING_RATE,
                "schedule": "constant",
                "warmup_ratio": 0.0,
                "recompute": recompute,
            },
            "output": str(directory),
        }
    )
    start = time.perf_counter()
    trained = [np.arange(len(ids)) > 0 for ids in rows]
    examples = [Example(ids, t, i) for i, (ids, t) in enumerate(zip(rows, trained, strict=True))]
    session = TrainingSession(config, examples=examples)
    # B = 0 would hide half of the gradients.
    rng = np.random.default_rng(1)
    modules = session.layout.to_modules(session.parameters())
    for path, (a, b) in modules.items():
        modules[path] = (a, rng.normal(0, 0.02, b.shape).astype(np.float32))
    session.device.write(session.adapter.parameters, session.layout.from_modules(modules))
    session.save(directory)
    set_up = time.perf_counter() - start

    losses, norms, times, encode = [], [], [], []
    start = time.perf_counter()
    first_step = 0.0
    stream = iter(session.stream)
    for index in range(WARM_UP + STEPS):
        batches = next(stream)
        begin = time.perf_counter()
        session.step(batches)
        encode.append(time.perf_counter() - begin)
        for metrics in session.finished_steps(wait=True):  # a fence, as torch.cuda.synchronize
            losses.append(metrics.loss)
            norms.append(metrics.grad_norm)
        times.append(time.perf_counter() - begin)
        if index == 0:
            first_step = time.perf_counter() - start
    # The same without fences: the host runs ahead, as in training.
    stream.restore(stream.state() | {"step": 0, "offset": 0, "epoch": 0})
    begin = time.perf_counter()
    for _ in range(STEPS):
        session.step(next(stream))
    list(session.finished_steps(wait=True))
    pipelined = (time.perf_counter() - begin) / STEPS
    result = {
        "ms": 1e3 * statistics.median(times[WARM_UP:]),
        "ms_pipelined": 1e3 * pipelined,
        "encode_ms": 1e3 * statistics.median(encode[WARM_UP:]),
        "set_up_s": set_up,
        "first_step_s": first_step,
        "memory_MiB": sum(session.device.allocated.values()) / 2**20,
        "memory": {k: round(v / 2**20, 1) for k, v in session.device.allocated.items()},
        "losses": losses,
        "norms": norms,
    }
    return result, session


def peft(
    model: Path, rows: list[np.ndarray], batch_size: int, adapter: Path,
    dtype: str, checkpointing: bool,
) -> dict[str, Any]:  # fmt: skip
    """Times PEFT's steps in eager PyTorch from the same adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = AutoModelForCausalLM.from_pretrained(
        model.parent, gguf_file=model.name, dtype=getattr(torch, dtype)
    ).cuda()
    if checkpointing:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    net = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    net.train()
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    losses, norms, times = [], [], []
    for index in range(WARM_UP + STEPS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        first = index * batch_size % len(rows)
        ids = torch.tensor(np.stack(rows[first : first + batch_size]), device="cuda").long()
        loss = net(input_ids=ids, labels=ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
        losses.append(float(loss))
        norms.append(float(norm))
    result = {
        "ms": 1e3 * statistics.median(times[WARM_UP:]),
        "memory_MiB": torch.cuda.max_memory_allocated() / 2**20,
        "losses": losses,
        "norms": norms,
    }
    del net, base, optimizer, parameters
    gc.collect()
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="SmolLM2-135M", choices=SHAPES)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--recompute", default="on,off")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.gguf"
        write_model(model, SHAPES[options.model])
        rng = np.random.default_rng(0)
        vocab_size = SHAPES[options.model].vocab_size
        n = options.rows * (WARM_UP + STEPS)
        rows = [rng.integers(3, vocab_size, options.length).astype(np.int32) for _ in range(n)]
        results: dict[str, Any] = {}
        kernels = []
        for recompute in options.recompute.split(","):
            adapter = Path(folder) / f"adapter-{recompute}"
            name = f"ours f32, recompute {recompute}"
            results[name], session = ours(model, rows, options.rows, adapter, recompute)
            info = session.device.info
            kernels = kernel_table(session)
            order = _order(session)
            del session
            gc.collect()
            print(name, {k: v for k, v in results[name].items() if k not in ("losses", "norms")},
                  flush=True)  # fmt: skip
        rows = [rows[i] for i in order]
        if not options.no_peft:
            for dtype in ("float32", "bfloat16"):
                for checkpointing in (False, True):
                    name = f"PEFT {dtype}" + (", checkpointing" if checkpointing else "")
                    results[name] = peft(model, rows, options.rows, adapter, dtype, checkpointing)
                    print(name, results[name]["ms"], results[name]["memory_MiB"], flush=True)
    write_report(options, results, kernels, info)


def _order(session: TrainingSession) -> list[int]:
    """The order in which the session saw its examples."""
    from lora.batches import DataStream

    config = session.config
    stream = DataStream(
        session.train_examples,
        batch_size=config.train.batch_size,
        shuffle=config.data.shuffle,
        seed=config.train.seed,
    )
    return [index for batches in stream for batch in batches for index in batch.examples]


def write_report(
    options: argparse.Namespace, results: dict[str, Any], kernels: list[KernelRow],
    info: dict[str, Any],
) -> None:  # fmt: skip
    """Writes the table and all figures as Markdown and JSON."""
    options.output.mkdir(parents=True, exist_ok=True)
    name = f"vs_peft-{options.model}-{options.rows}x{options.length}"
    try:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        driver = f"{info['device']} {info['description']}"
    reference = results.get("PEFT float32", {}).get("ms")
    lines = [
        f"# {options.model}, {options.rows} × {options.length} tokens, r={RANK}, all linear layers",
        "",
        f"{driver}, through Vulkan, {date.today()}. Median of {STEPS} steps after {WARM_UP}, the "
        "device waited for after each; weights random. Memory: ours what is allocated, PEFT's "
        "torch.cuda.max_memory_allocated.",
        "",
        "| | ms a step | against PEFT f32 | memory, MiB | first losses | first gradient norms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for label, result in results.items():
        ratio = f"{reference / result['ms']:.2f}×" if reference else ""
        lines.append(
            f"| {label} | {result['ms']:.1f} | {ratio} | {result['memory_MiB']:.0f} | "
            f"{', '.join(f'{loss:.5f}' for loss in result['losses'][:3])} | "
            f"{', '.join(f'{norm:.4f}' for norm in result['norms'][:3])} |"
        )
    for label, result in results.items():
        if "ms_pipelined" in result:
            lines += [
                "",
                f"{label}: {result['ms_pipelined']:.1f} ms a step without waiting, "
                f"{result['encode_ms']:.1f} ms of it encoding on the host; set-up "
                f"{result['set_up_s']:.1f} s, first step {result['first_step_s']:.1f} s.",
            ]
    lines += [
        "",
        f"GPU time of a step by kernel (the last of ours, {len(kernels)} kinds of dispatch):",
        "",
    ]
    lines += [
        "| kernel | label | calls | ms | share | TFLOP/s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    total = sum(row.seconds for row in kernels)
    for row in kernels:
        speed = f"{row.flops / row.seconds / 1e12:.1f}" if row.flops else ""
        lines.append(
            f"| {row.kernel} | {row.label} | {row.calls} | {1e3 * row.seconds:.2f} | "
            f"{row.seconds / total:.1%} | {speed} |"
        )
    text = "\n".join(lines) + "\n"
    (options.output / f"{name}.md").write_text(text)
    (options.output / f"{name}.json").write_text(
        json.dumps(
            {"device": driver, "results": results, "kernels": [asdict(row) for row in kernels]},
            indent=1,
        )
        + "\n"
    )
    print(text)


if __name__ == "__main__":
    main()
