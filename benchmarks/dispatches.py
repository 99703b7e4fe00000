"""How many dispatches a training step takes, kernel by kernel, counted without a device.

A session is recorded on memory that only counts, as an H200 with matrix units would record it with
the tiles that the model of a product's time chooses:

    python benchmarks/dispatches.py --runs SmolLM2-135M:1x128,1x512,4x512 Llama-1.2B:1x128

`--layer 5` lists what one layer is made of, in order; `--plans` the products with their plans;
`--storage-buffers 8` records as a device that binds no more does, where no gradients wait;
`--option dora` with one of benchmarks/options.py's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.options import OPTIONS, with_option
from benchmarks.synthetic import write_models
from lora.forward.plans.matmul_plans import plan_of
from lora.shaders.facts import DeviceFacts
from lora.shaders.memory import CountingMemory
from lora.shaders.program import Dispatch
from lora.shaders.recording import Recording
from lora.shaders.webgpu import MatrixShape
from lora.training.device_state import SessionPlan
from lora.training.workload import Workload
from tests.support.synthetic_models import SHAPES
from tests.support.synthetic_runs import as_examples, random_sequences, run_config

# What Dawn says of an H200 (driver 580.159.04), as far as recording asks.
H200 = DeviceFacts(
    name="NVIDIA H200",
    info={"adapter_type": "DiscreteGPU", "backend_type": "Vulkan"},
    is_cpu=False,
    features=frozenset({"shader-f16", "subgroups"}),
    max_buffer=4 << 30,
    max_binding=(4 << 30) - 4,
    workgroup_memory=49152,
    most_lanes=1024,
    most_storage_buffers=16,
    implementation="dawn",
    subgroup_lanes=(32, 32),
    matrix_shapes=(MatrixShape(16, 16, 16, "f16", "f32", 32, 32),),
)


def plan_run(
    facts: DeviceFacts,
    path: Path,
    name: str,
    size: str,
    precision: str,
    recompute: str,
    option: str = "none",
) -> SessionPlan:
    """A step of LoRA on all linear layers, rank 16, as a device records it."""
    batch_size, length = (int(n) for n in size.split("x"))
    config = run_config(
        path, batch_size=batch_size, length=length, steps=1, precision=precision,
        recompute=recompute,
    )  # fmt: skip
    sequences = random_sequences(SHAPES[name].vocab_size, batch_size, length)
    config = with_option(config, option)
    return SessionPlan.of(facts, Workload.open(config, train=True, examples=as_examples(sequences)))


def dispatches_of(plan: SessionPlan) -> list[Dispatch]:
    """Those of a step of one micro-batch, in order."""
    training = plan.programs.training
    assert training is not None
    programs = plan.programs.step
    return [dispatch for program in programs for dispatch in program.dispatches]


def counts(dispatches: Sequence[Dispatch]) -> Counter[str]:
    """Dispatches by template."""
    return Counter(dispatch.template for dispatch in dispatches)


def _print_layer(dispatches: Sequence[Dispatch], layer: int) -> None:
    for dispatch in dispatches:
        if f"layers.{layer}." in dispatch.label:
            print(f"    {dispatch.label:44} {dispatch.template:28} {dispatch.workgroups}")


def _print_plans(plan: SessionPlan) -> None:
    facts, precision = plan.facts, plan.workload.config.train.precision
    recording = Recording(facts, CountingMemory(facts), precision)
    of_products: Mapping[str, int] = Counter(
        f"{r.product.rows:5} × {r.product.columns:6} × {r.product.contraction:6} "
        f"{'back' if r.product.transposed else '    '} {r.product.x_type}  "
        f"{plan_of(recording, r).name}"
        for r in plan.requests
    )
    for line, n in of_products.items():
        print(f"    {n:3} × {line}")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--runs", nargs="+", metavar="MODEL:BATCHxLENGTH,…",
        default=["SmolLM2-135M:1x128,1x512,4x512", "Llama-1.2B:1x128,1x512,4x512"],
    )  # fmt: skip
    parser.add_argument("--precision", nargs="+", default=["f16"], choices=("f32", "f16"))
    parser.add_argument("--recompute", default="off", choices=("on", "off"))
    parser.add_argument("--files", type=Path, help="a folder that keeps the models' files")
    parser.add_argument("--layer", type=int, help="list the dispatches of this layer")
    parser.add_argument("--kernels", action="store_true", help="count them by kernel")
    parser.add_argument("--plans", action="store_true", help="list the products and their plans")
    parser.add_argument("--option", default="none", choices=OPTIONS)
    parser.add_argument("--storage-buffers", type=int, default=H200.most_storage_buffers)
    args = parser.parse_args()
    facts = replace(H200, most_storage_buffers=args.storage_buffers)
    runs = dict(run.split(":") for run in args.runs)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.files or Path(temporary)
        missing = [name for name in runs if not (folder / name / "model.gguf").exists()]
        if missing:
            write_models(folder, missing)
        for name, sizes in runs.items():
            for size in sizes.split(","):
                for precision in args.precision:
                    plan = plan_run(
                        facts, folder / name / "model.gguf", name, size, precision, args.recompute,
                        args.option,
                    )  # fmt: skip
                    found = dispatches_of(plan)
                    memory = sum(plan.allocated.values()) / 2**20
                    print(
                        f"{name} {size} {precision}: {len(found)} dispatches, {memory:.1f} MiB, "
                        f"of them logits {plan.allocated['logits'] / 2**20:.1f}"
                    )
                    if args.kernels:
                        for template, n in counts(found).most_common():
                            print(f"    {n:5} {template}")
                    if args.layer is not None:
                        _print_layer(found, args.layer)
                    if args.plans:
                        _print_plans(plan)


if __name__ == "__main__":
    main()
