"""Newer models: a training step of ours beside PEFT's in bf16, on one GPU in one run.

The GGUFs have the models' true sizes and random quantized weights
(tests/support/synthetic_models.py). The peer's model is built from transformers' config with random
bf16 weights: loading these files there would take longer than all that is measured. So losses are
not compared (tests/parity does that), only milliseconds a step and peak memory. Both train LoRA
r=16 on the same matrices with AdamW and clipping. Of Qwen3.5 it also says how much of our step the
gated DeltaNets' own kernels take; PEFT's side has flash-linear-attention's kernels where that is
installed, else transformers' fallback, and the line says which.

    python benchmarks/newer_models.py --output results.json
    python benchmarks/newer_models.py --models tiny-gemma-4 --sizes 1x32 --steps 4

It prints one line a measurement, then a table for each model: ms a step (median of steps with a
fence after each; and without fences, as training runs) and MiB at the peak. Where transformers has
no Gemma 4, it says so and times ours alone.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.kernels import time_step
from benchmarks.sessions import Case, markdown_table, step_times
from benchmarks.synthetic import write_models
from benchmarks.vs_peft import ours
from tests.support.synthetic_gemma4 import Gemma4Shape
from tests.support.synthetic_models import SHAPES
from tests.support.synthetic_recurrent import Lfm2Shape, Qwen35Shape
from tests.support.synthetic_runs import ALPHA, RANK
from tests.support.synthetic_shape import Shape

MODELS = (
    *("Gemma-4-E2B", "Gemma-4-E4B", "Ministral-3-3B"),
    *("LFM2-1.2B", "Qwen3.5-0.8B", "Qwen3.5-9B"),
)
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PER_LAYER = ("per_layer_input_gate", "per_layer_projection")


class NoPeerError(Exception):
    """There is nothing to compare with here; the message says why."""


def peer_model(shape: Shape) -> Any:
    """Transformers' model of a shape, random bf16 weights, on the GPU if PyTorch has one.

    Raises:
        NoPeerError: transformers, or its version, has no such model.
    """
    import torch
    import transformers

    own: dict[str, Any] = {}
    names = ("Gemma4TextConfig", "Gemma4ForCausalLM")
    if isinstance(shape, (Lfm2Shape, Qwen35Shape)):
        *names, own = shape.peer()
    elif not isinstance(shape, Gemma4Shape):
        names = ("Ministral3Config", "Ministral3ForCausalLM")
    try:
        config_class, model_class = (getattr(transformers, name) for name in names)
    except AttributeError:
        raise NoPeerError(f"transformers {transformers.__version__} has no {names[1]}") from None
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_size,
        "tie_word_embeddings": shape.tied_head,
        "pad_token_id": 0,
        **own,
    }
    if isinstance(shape, Gemma4Shape):
        kinds = {True: "sliding_attention", False: "full_attention"}
        sizes |= {
            "global_head_dim": shape.global_head_size,
            "sliding_window": 512,
            "layer_types": [kinds[shape.is_local(layer)] for layer in range(shape.n_layers)],
            "final_logit_softcapping": 30.0,
            "vocab_size_per_layer_input": shape.vocab_size,
            "hidden_size_per_layer_input": shape.input_size,
            "num_kv_shared_layers": shape.n_shared,
            "use_double_wide_mlp": shape.wide,
        }
    config = config_class(**sizes, attn_implementation="sdpa")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model: Any = model_class(config)
    finally:
        torch.set_default_dtype(before)
    return model


def peft(base: Any, case: Case, data: list[np.ndarray], *, checkpointing: bool) -> dict[str, Any]:
    """Times PEFT's steps in eager PyTorch; leaves `base` as it was."""
    import torch
    from peft import LoraConfig, get_peft_model

    on_gpu = next(base.parameters()).device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if checkpointing:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    kind = base.config.model_type
    targets: Any = [*_TARGETS, *(_PER_LAYER if "gemma4" in kind else ())]
    if "qwen3_5" in kind or "lfm2" in kind:
        targets = "all-linear"
    net = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    net.train()
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)

    def step(number: int) -> None:
        batch = np.stack(data[number * case.batch_size : (number + 1) * case.batch_size])
        ids = torch.tensor(batch).to(parameters[0].device).long()
        net(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _wait(on_gpu)

    times = step_times(step, len(data) // case.batch_size, case.steps)
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    net.unload()
    if checkpointing:
        base.gradient_checkpointing_disable()
        base.disable_input_require_grads()
    return {"ms": 1e3 * statistics.median(times), "memory_MiB": peak}


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        import torch

        torch.cuda.synchronize()


def delta_share(path: Path, name: str, case: Case, precision: str) -> str:
    """How much of a step's time on the device the gated DeltaNets' own kernels take.

    Their products are those of any layer, and are not counted.
    """
    try:
        timed = time_step(
            path, SHAPES[name].vocab_size, case.batch_size, case.length, precision, "on"
        )
    except Exception as error:  # no timestamps, or no memory: the times above stand
        return f"{precision}: no kernel times: {error}"
    kernels = timed["kernels"]
    seconds = {
        kernel: sum(row["seconds"] for row in kernels if row["kernel"] == kernel)
        for kernel in {row["kernel"] for row in kernels}
    }
    whole = sum(seconds.values())
    own = {
        kernel: value
        for kernel, value in seconds.items()
        if kernel.startswith(("delta_", "causal_conv"))
    }
    parts = ", ".join(f"{k} {1e3 * v:.1f}" for k, v in sorted(own.items(), key=lambda p: -p[1]))
    return (
        f"{precision}, recompute on: DeltaNet's kernels take {1e3 * sum(own.values()):.1f} of "
        f"{1e3 * whole:.1f} ms ({sum(own.values()) / whole:.1%}): {parts}"
    )


def _peer_kernels() -> str:
    """What computes DeltaNets on PEFT's side."""
    found = [name for name in ("fla", "causal_conv1d") if importlib.util.find_spec(name)]
    return f"computed with {' and '.join(found)}" if found else "transformers' fallback in PyTorch"


def compare(
    name: str, path: Path, cases: list[Case], options: argparse.Namespace,
    keep: Callable[[str, Case, str, dict[str, Any]], None],
) -> None:  # fmt: skip
    """Times one model: ours at every size, then PEFT's two variants."""
    for case in cases:
        for precision in options.precision.split(","):
            kept = case.length <= options.longest_kept
            for recompute in options.recompute.split(",") if kept else ["on"]:
                label = f"ours {precision}, recompute {recompute}"
                try:
                    with tempfile.TemporaryDirectory() as adapter:
                        result = ours(path, name, case, precision, recompute, Path(adapter))
                except Exception as error:  # memory, most likely: the others go on
                    print(f"{name} {case}: {label}: {error}", flush=True)
                    continue
                keep(name, case, label, result)
    if isinstance(SHAPES[name], Qwen35Shape):
        longest = max(cases, key=lambda case: case.length)  # where their share is the largest
        for precision in options.precision.split(","):
            print(f"{name} {longest}: {delta_share(path, name, longest, precision)}", flush=True)
    if options.no_peft:
        return
    if isinstance(SHAPES[name], Qwen35Shape):
        print(f"{name}: PEFT's DeltaNet is {_peer_kernels()}", flush=True)
    try:
        base = peer_model(SHAPES[name])
    except (NoPeerError, ImportError) as reason:
        print(f"{name}: PEFT is left out: {reason}", flush=True)
        return
    for checkpointing in (False, True):
        for case in cases:
            if not checkpointing and case.length > options.longest_kept:
                continue
            label = "PEFT bf16" + (", checkpointing" if checkpointing else "")
            try:
                result = peft(base, case, case.data(name), checkpointing=checkpointing)
            except Exception as error:
                print(f"{name} {case}: {label}: {error}", flush=True)
                continue
            keep(name, case, label, result)
    del base
    gc.collect()


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """All measurements of one model, by size and variant."""
    rows = []
    for size, variants in results.items():
        for label, result in variants.items():
            numbers = (result["ms"], result.get("ms_pipelined"), result.get("memory_MiB"))
            shown = ["" if number is None else f"{number:,.1f}" for number in numbers]
            rows.append([size, label, *shown])
    header = ["tokens", "variant", "ms a step", "ms without fences", "MiB at the peak"]
    return "\n".join(markdown_table(header, rows))


def main() -> None:
    parser = argparse.ArgumentParser()
    # fmt: off
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=SHAPES)
    parser.add_argument("--sizes", nargs="+", default=["1x512", "4x512"], metavar="BATCHxLENGTH")
    parser.add_argument("--precision", default="f32,f16", help="of ours")
    parser.add_argument("--recompute", default="on,off", help="of ours")
    parser.add_argument("--longest-kept", type=int, default=10**6, metavar="LENGTH",
                        help="beyond it only what computes activations again is timed")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--output", type=Path, help="a JSON file, written after every measurement")
    parser.add_argument("--files", type=Path, help="keeps the GGUFs; those there are taken")
    parser.add_argument("--write-only", action="store_true", help="with --files: no more than that")
    # fmt: on
    options = parser.parse_args()
    cases = [Case(*map(int, size.split("x")), options.steps) for size in options.sizes]
    results: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}

    def keep(name: str, case: Case, label: str, result: dict[str, Any]) -> None:
        results.setdefault(name, {}).setdefault(str(case), {})[label] = result
        if options.output is not None:
            options.output.write_text(json.dumps(results, indent=1))
        memory = result.get("memory_MiB")
        shown = "" if memory is None else f", {memory:,.0f} MiB"
        print(f"{name} {case}: {label}: {result['ms']:.1f} ms{shown}", flush=True)

    for name in options.models:  # one file at a time: the largest is five gigabytes
        with tempfile.TemporaryDirectory() as folder:
            path = options.files and options.files / name / "model.gguf"
            if path is None or not path.exists():
                start = time.perf_counter()
                path = write_models(options.files or Path(folder), [name])[name]
                print(f"{name}: file written in {time.perf_counter() - start:.0f} s", flush=True)
            if options.write_only:
                continue
            compare(name, path, cases, options, keep)
        print(f"\n{name}\n\n{table(results.get(name, {}))}\n", flush=True)


if __name__ == "__main__":
    main()
