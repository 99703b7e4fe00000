"""Single products with frozen matrices: TFLOP/s of every plan that the device has.

    python benchmarks/products.py [--sizes 4096x4096x4096,…] [--types F16,Q4_K] [--seconds 60]
        [--precision f16] [--bodies matrix,decoded,paired,prepared,tiled] [--output FILE]

In f32 the plain body stands beside numbers in pairs of f16 on matrix units, made on the way into
tiles (paired) or beforehand (prepared):

    python benchmarks/products.py --precision f32 --sizes 4096x4096x4096 --types F32,Q4_K

A size is rows × columns × contraction, forward and to the input (where the last two change
places). Plans are timed in turns on tensors of ordinary numbers, in passes of 5 ms after a second
of warming up: a GPU that mostly waits is up to four times slower. The median counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import matmul as timings
from lora.backward.matmul import matmul_backward
from lora.forward.gguf.file import GGUFTensor
from lora.forward.matmul import matmul
from lora.forward.model.weights import load_matrix
from lora.forward.plans.matmul_plans import Request, noting
from lora.forward.plans.matmul_tiles import Plan, ranked_plans
from lora.forward.plans.workbench import fits
from lora.forward.product import Product
from lora.shaders.device import Device
from lora.shaders.facts import DeviceFacts
from lora.shaders.memory import CountingMemory
from lora.shaders.program import Program
from lora.shaders.recording import Recording

SIZES = (
    "4096x4096x4096,2048x8192x2048,2048x2048x8192,512x8192x2048,512x28672x4096,2048x28672x4096,"
    "2048x4096x14336"
)


def request_of(
    facts: DeviceFacts, size: str, kind: str, precision: str, transposed: bool
) -> Request:
    """The product of that size, recorded under that precision."""
    rows, columns, contraction = map(int, size.split("x"))
    requests: list[Request] = []
    memory = CountingMemory(facts)
    recording = Recording(facts, memory, precision, plans=noting(requests))
    n_out, n_in = (contraction, columns) if transposed else (columns, contraction)
    nothing = np.zeros((0, 0), np.uint8)  # memory that only counts takes no weights
    tensor = GGUFTensor("w", GGMLQuantizationType[kind], (n_out, n_in), nothing)
    matrix, extent = load_matrix(recording, [tensor]), memory.extent(rows)
    x = memory.empty((rows, contraction), precision, extent=extent)
    out = memory.empty((rows, columns), precision, extent=extent)
    program = Program(recording)
    if transposed:
        matmul_backward(program, x, matrix, out=out)
    else:
        matmul(program, Product(x, matrix), out=out)
    return requests[0]


def plans_of(facts: DeviceFacts, request: Request, bodies: list[str]) -> list[Plan]:
    """Every tile of some bodies with its best two numbers of stretches by the model."""
    chosen: list[Plan] = []
    for plan in ranked_plans(request.space(facts)):
        of_tile = sum(other.tile == plan.tile for other in chosen)
        if plan.tile.body in bodies and of_tile < 2 and fits(facts, request, plan):
            chosen.append(plan)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--types", default="F16,Q4_K")
    parser.add_argument("--precision", choices=["f16", "f32"], default="f16")
    parser.add_argument("--bodies", default="matrix,decoded,paired,prepared,tiled")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    timings.WARM_UP, timings.PASS_SECONDS = 1.0, 5e-3
    device = Device(options.device)
    facts = device.facts
    print(f"{facts.name}, {facts.info['description']}, {facts.software}, {facts.matrix_shapes}")
    sizes, kinds = options.sizes.split(","), options.types.split(",")
    jobs = [(s, k, t) for s in sizes for k in kinds for t in (False, True)]
    rows: list[dict[str, Any]] = []
    for size, kind, transposed in jobs:
        request = request_of(facts, size, kind, options.precision, transposed)
        plans = plans_of(facts, request, options.bodies.split(","))
        times = timings.time_plans(device, request, plans, options.seconds / len(jobs))
        medians = {plan: statistics.median(values) for plan, values in times.items()}
        print(f"{size} {kind}{' to the input' if transposed else ''}")
        for plan, microseconds in sorted(medians.items(), key=lambda item: item[1]):
            speed = request.flops / microseconds / 1e6
            rows.append({"size": size, "type": kind, "transposed": transposed, "plan": plan.name,
                         "us": microseconds, "TFLOP/s": speed})  # fmt: skip
            print(f"    {plan.name:44s} {microseconds:9.1f} us {speed:7.1f} TFLOP/s", flush=True)
    if options.output:
        options.output.write_text(
            json.dumps({"adapter": facts.name, "driver": facts.info["description"],
                        "software": facts.software, "precision": options.precision,
                        "rows": rows}, indent=1)
        )  # fmt: skip


if __name__ == "__main__":
    main()
