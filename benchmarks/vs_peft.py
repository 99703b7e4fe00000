"""A training step of ours against Hugging Face PEFT's on the same GPU, in one run.

The models have real ones' shapes and tensor types with random weights (benchmarks/synthetic.py), so
that no file need travel; transformers loads the very same GGUF, once a model. Both sides train LoRA
r=16 on all linear layers with AdamW and clipping, from the same adapter on the same random tokens.
PEFT runs as its users run it: eager, with torch.compile, with Liger's kernels, on NF4
(benchmarks/peft_side.py); its float32 is the reference for losses and gradient norms. A `p` behind
a shape has sequences of an eighth of the length up to all of it: ours end to end, PEFT's padded.

    python benchmarks/vs_peft.py --shapes SmolLM2-135M:1x128,1x512 Llama-1.2B:1x512
    python benchmarks/vs_peft.py --model Llama-1.2B --batch-size 1 --length 8192 --recompute on \
        --no-peft --steps 6
    python benchmarks/vs_peft.py --model tiny --no-peft --curve 50
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.peft_side import LEARNING_RATE, PEFT_VARIANTS, load_base, make_base, peft, serves
from benchmarks.sessions import Case, describe, shake_adapter, step_times, used_memory
from benchmarks.synthetic import write_models
from benchmarks.vs_peft_report import write_curves, write_report
from lora.shaders.device import Device
from lora.training.profiling import kernel_table
from lora.training.session import TrainingSession
from lora.training.step_time import expected_seconds
from tests.support.synthetic_models import SHAPES
from tests.support.synthetic_runs import as_examples, loss_curves, run_config


def ours(model: Path, name: str, case: Case, precision: str, recompute: str,
         adapter: Path) -> dict[str, Any]:  # fmt: skip
    """Times our steps; leaves the untrained adapter in `adapter` for PEFT to start from."""
    gc.collect()
    before = used_memory()
    config = run_config(
        model,
        batch_size=case.batch_size,
        length=case.length,
        steps=case.warm_up + case.steps,
        precision=precision,
        recompute=recompute,
        learning_rate=LEARNING_RATE,
    )
    start = time.perf_counter()
    with Device() as device:
        opened = used_memory()
        examples = as_examples(case.data(name))
        with TrainingSession(config, examples=examples, device=device) as session:
            shake_adapter(session)
            set_up = time.perf_counter() - start
            session.save(adapter)

            losses, norms, encode = [], [], []
            assert session.stream is not None
            batches = list(session.stream)

            def step(number: int) -> None:
                begin = time.perf_counter()
                session.step(batches[number])
                encode.append(time.perf_counter() - begin)
                # A fence, as torch.cuda.synchronize.
                for metrics in session.finished_steps(wait=True):
                    losses.append(metrics.loss)
                    norms.append(metrics.grad_norm)

            begin = time.perf_counter()
            step(0)
            first = time.perf_counter() - begin
            for number in range(1, len(batches)):
                step(number)
            n_compared = len(losses)
            times = step_times(step, len(batches), case.steps)
            used = used_memory()
            median = statistics.median(times)
            # The same without fences: the host runs ahead, as in training. Some seconds of it are
            # enough.
            n = max(2, min(max(case.steps, int(1 / median)), int(5 / median)))
            begin = time.perf_counter()
            for number in range(n):
                session.step(batches[number % len(batches)])
            session.finished_steps(wait=True)
            pipelined = (time.perf_counter() - begin) / n
            timed = "timestamp-query" in device.facts.features
            lengths = [len(ids) for ids in case.data(name)[-case.batch_size :]]
            repeats = 5 if median < 0.5 else 1
            kernels = kernel_table(session, repeats, lengths) if timed else []
            expected = expected_seconds(session.plan, device) if timed else None
            return {
                "ms": 1e3 * median,
                "planned_ms": None if expected is None else 1e3 * expected,
                "ms_pipelined": 1e3 * pipelined,
                "encode_ms": 1e3 * statistics.median(encode[-len(times) :]),
                "set_up_s": set_up,
                "first_step_s": first,
                "memory_MiB": device.allocated.total() / 2**20,
                "memory": {k: round(v / 2**20, 1) for k, v in device.allocated.items()},
                "planned_MiB": session.plan.allocated.total() / 2**20,
                "context_MiB": _difference_mib(before, opened),
                "nvidia_smi_MiB": _difference_mib(before, used),
                "losses": losses[:n_compared],
                "norms": norms[:n_compared],
                "kernels": [asdict(row) for row in kernels],
                "device": describe(device),
            }


def _difference_mib(before: int | None, after: int | None) -> float | None:
    return None if before is None or after is None else (after - before) / 2**20


# -- the command ----------------------------------------------------------------------------------


def parse_shapes(texts: list[str], steps: int) -> dict[str, list[Case]]:
    """`MODEL:BATCHxLENGTH[p],…` each, to a model's cases.

    Raises:
        ValueError: a text of another form, or a model that benchmarks/synthetic.py has not.
    """
    cases: dict[str, list[Case]] = {}
    for text in texts:
        name, _, sizes = text.partition(":")
        if name not in SHAPES:
            raise ValueError(f"{name!r} is none of {', '.join(SHAPES)}")
        for size in sizes.split(","):
            batch_size, times, length = size.removesuffix("p").partition("x")
            if not (times and batch_size.isdigit() and length.isdigit()):
                raise ValueError(f"{size!r} in {text!r} is not BATCHxLENGTH, as 4x512 or 8x512p")
            case = Case(int(batch_size), int(length), steps, packed=size.endswith("p"))
            cases.setdefault(name, []).append(case)
    return cases


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; `cases` holds what is to be timed, `variants` those of PEFT."""
    parser = argparse.ArgumentParser()
    # fmt: off
    parser.add_argument("--shapes", nargs="+", metavar="MODEL:BATCHxLENGTH,…",
                        help="several at once, in place of --model, --batch-size and --length")
    parser.add_argument("--model", default="SmolLM2-135M", choices=SHAPES)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--precision", default="f32,f16", help="of ours")
    parser.add_argument("--recompute", default="on,off", help="of ours")
    parser.add_argument("--peft", default="float32,float32-checkpointing,bfloat16,"
                        "bfloat16-checkpointing", metavar="VARIANT,…",
                        help=f"which of {', '.join(PEFT_VARIANTS)}")
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--random-base", action="store_true",
                        help="made-up numbers for PEFT, too: quick, but without losses to compare")
    parser.add_argument("--steps", type=int, default=20,
                        help="timed steps, after a quarter as many to warm up")
    parser.add_argument("--curve", type=int, default=0, metavar="STEPS",
                        help="train that many steps in each precision and compare the losses")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    # fmt: on
    options = parser.parse_args(arguments)
    options.variants = [] if options.no_peft or options.curve else options.peft.split(",")
    unknown = [variant for variant in options.variants if variant not in PEFT_VARIANTS]
    if unknown:
        parser.error(f"--peft: {unknown[0]!r} is none of {', '.join(PEFT_VARIANTS)}")
    options.precision = options.precision.split(",")
    shapes = options.shapes or [f"{options.model}:{options.batch_size}x{options.length}"]
    try:
        options.cases = parse_shapes(shapes, options.steps)
    except ValueError as error:
        parser.error(f"--shapes: {error}")
    return options


class Clock:
    """Says what was done, and when: minutes on a lent GPU are few."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self._start:6.1f} s] {text}", flush=True)


def compare(
    options: argparse.Namespace, name: str, cases: list[Case], path: Path, clock: Clock
) -> None:
    """Times one model, ours at every shape and then PEFT's variants.

    Every result is written at once: whoever stops this keeps what there is.
    """
    adapter = path.with_suffix(".adapter")
    results: dict[Case, dict[str, dict[str, Any]]] = {case: {} for case in cases}

    def keep(case: Case, label: str, result: dict[str, Any]) -> None:
        results[case][label] = result
        write_report(options.output, name, case, results[case])
        clock.say(f"{name} {case}: {label}: {result['ms']:.1f} ms")

    for case in cases:
        for precision in options.precision:
            for recompute in options.recompute.split(","):
                result = ours(path, name, case, precision, recompute, adapter)
                keep(case, f"ours {precision}, recompute {recompute}", result)
    if options.variants:
        base = load_base(path)
        clock.say(f"{name}: transformers' model loaded")
        for key, variant in PEFT_VARIANTS.items():
            if key in options.variants and not serves(base, variant):
                del base
                base = load_base(path)
                clock.say(f"{name}: transformers' model loaded anew")
            for case in cases if key in options.variants else ():
                try:
                    keep(case, variant.label, peft(base, name, case, variant, adapter))
                except Exception as error:  # one variant that can't run here keeps the others
                    clock.say(f"{name} {case}: {variant.label}: {type(error).__name__}: {error}")
    for case in cases:
        print(write_report(options.output, name, case, results[case]), flush=True)


def main() -> None:
    options = parse_options()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_models(
            Path(folder),
            list(options.cases),
            make_base if options.variants and not options.random_base else None,
        )
        clock.say("models prepared")
        for name, cases in options.cases.items():
            if not options.curve:
                compare(options, name, cases, paths[name], clock)
                continue
            for case in cases:
                curves = loss_curves(
                    paths[name],
                    options.curve,
                    options.precision,
                    batch_size=case.batch_size,
                    length=case.length,
                )
                print(write_curves(options.output, name, case, curves), flush=True)
                clock.say(f"{name} {case}: curves")


if __name__ == "__main__":
    main()
