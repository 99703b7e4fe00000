"""The gated delta rule's kernels on matrix units beside the plain ones: microseconds and TFLOP/s.

Forward and backward of one layer, with f16 training's recording; the two in turns, the median of
each. Says first whether the kernels on units meet float64 on heads of the models' size.

    python benchmarks/gated_delta.py [--runs qwen0.8b:1x8192 qwen9b:4x512] [--output F.json]

TFLOP/s count what the chunked rule needs, lower triangles as halves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.attention import warm_up
from lora.backward.gated_delta import DeltaGradients, gated_delta_backward
from lora.checks.comparison import NotHereError
from lora.checks.kernels.recurrent import LARGE, SIZES, STARTS, check_on_units, random_inputs
from lora.checks.tensors import activation
from lora.forward.delta_matrix import delta_cut
from lora.forward.gated_delta import DeltaSizes, DeltaTensors, chunk_rows, gated_delta
from lora.forward.matmul_matrix import shape_on
from lora.shaders.device import Device
from lora.shaders.program import Program
from lora.shaders.recording import Recording

SHAPES = {
    "qwen0.8b": DeltaSizes(16, 16, 128),
    "qwen9b": DeltaSizes(16, 32, 128),
    "tiny": DeltaSizes(2, 4, 16),  # for a look at this script on a CPU device
}


def recorded(
    recordings: dict[str, Recording], sizes: DeltaSizes, lengths: list[int]
) -> dict[str, Program]:
    """The same rule over the same tensors, by each recording."""
    first = next(iter(recordings.values()))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    rows = int(starts[-1])
    extent = first.memory.extent(rows)
    tensors = DeltaTensors.allocate(first, sizes, extent)
    x = random_inputs(sizes, tuple(int(start) for start in starts))
    parts = [part.reshape(rows, -1) for part in (x.q, x.k, x.v, x.g, x.beta)]
    first.memory.write(tensors.inputs, np.concatenate(parts, axis=1))
    bounds = np.repeat(np.stack([starts[:-1], starts[1:]], axis=1), lengths, axis=0)
    segments = activation(first, bounds.astype(np.uint32), extent)
    gradients = DeltaGradients.allocate(first, sizes, extent)
    d_o = np.random.default_rng(1).standard_normal(gradients.d_deltas.shape, np.float32)
    first.memory.write(gradients.d_deltas, d_o)
    programs = {}
    for name, recording in recordings.items():
        programs[name] = program = Program(recording)
        gated_delta(program, tensors, sizes, segments)
        gated_delta_backward(program, tensors, sizes, segments, gradients)
    return programs


def measure(device: Device, run: str, repeats: int) -> list[dict[str, Any]]:
    """Every kernel's median time of one run."""
    name, text = run.split(":")
    examples, length = (int(part) for part in text.split("x"))
    sizes, figures = SHAPES[name], []
    with device.arena() as memory:
        half = device.recording(memory=memory, precision="f16")
        recordings = {"plain": replace(half, body="tiled"), "units": replace(half, body="matrix")}
        chunk = chunk_rows(half.facts)
        if delta_cut(recordings["units"], chunk, sizes.head_size) is None:
            print(f"{run}: this device's units, or its workgroup memory, do not do")
            del recordings["units"]
        programs = recorded(recordings, sizes, [length] * examples)
        times: dict[tuple[str, str], list[float]] = defaultdict(list)
        flops = {}
        for program in programs.values():
            warm_up(program, 0.0 if device.facts.is_cpu else 0.5)
        for _ in range(repeats):
            for kind, program in programs.items():
                for one in program.time():
                    times[kind, one.template].append(one.seconds)
                    flops[kind, one.template] = one.flops
    print(f"\n{run}: {sizes}")
    for kind in programs:
        total = 0.0
        for (of, kernel), found in times.items():
            if of == kind:
                us = 1e6 * statistics.median(found)
                total += us
                rate = flops[of, kernel] / us / 1e6
                print(f"  {kind:6} {us:9.1f} us {rate:6.1f} TFLOP/s  {kernel}")
                figures.append({"run": run, "kind": kind, "kernel": kernel, "us": us,
                                "TFLOPS": rate})  # fmt: skip
        print(f"  {kind:6} {total:9.1f} us together", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    runs = [f"{name}:{text}" for name in ("qwen0.8b", "qwen9b") for text in ("1x8192", "4x512")]
    parser.add_argument("--runs", nargs="+", default=runs, help="SHAPE:EXAMPLESxROWS")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="a JSON file, written after every run")
    args = parser.parse_args()
    figures: list[dict[str, Any]] = []
    with Device() as device:
        print(f"{device.facts.name}, {device.facts.software}, {shape_on(device.facts)}")
        for sizes, starts in ((SIZES, STARTS), LARGE):
            for backward in (False, True):
                what = f"heads of {sizes.head_size}, {'backward' if backward else 'forward'}"
                try:
                    with device.arena() as memory:
                        recording = device.recording(memory=memory)
                        result = check_on_units(recording, sizes, starts, backward=backward)
                except NotHereError as why:
                    print(f"{what}: not here: {why}")
                    continue
                print(f"{what}: {'right' if result.passed else 'WRONG'} "
                      f"({result.error:.2e} of {result.bound:.2e})")  # fmt: skip
        for run in args.runs:
            figures += measure(device, run, args.repeats)
            if args.output is not None:
                args.output.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
