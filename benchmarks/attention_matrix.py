"""Attention on matrix units over its cuts, beside the plain kernels: microseconds and TFLOP/s.

Every cut is timed in turns with the others, then the best of each kernel is checked against float64
numpy. Prints the cuts of each kernel and run, fastest first; writes all figures to --output.

    python benchmarks/attention_matrix.py [--runs llama1b:1x512 llama8b:4x512] [--output F.json]

TFLOP/s count the visible pairs of the examples alone: 4, 6 and 8 operations for each and column.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.attention import record, warm_up
from lora.checks.references.attention import (
    Shape,
    attention_backward_reference,
    attention_reference,
    segments_of,
)
from lora.forward import attention as forward_attention
from lora.forward.attention import visible_pairs
from lora.forward.attention_matrix import ROUNDS, MatrixCut, choose_cut
from lora.forward.matmul_matrix import EMULATED, shape_on
from lora.shaders.device import Device
from lora.shaders.memory import CountingMemory
from lora.shaders.program import Dispatch, Program

SHAPES = {
    "smollm2": Shape(9, 3, 64, 64**-0.5),
    "gemma3": Shape(4, 1, 256, 256**-0.5, window=512),
    "llama1b": Shape(32, 8, 64, 64**-0.5),
    "llama8b": Shape(32, 8, 128, 128**-0.5),
    "tiny": Shape(2, 1, 64, 64**-0.5),  # for a look at this script on a CPU device
}
KERNELS = ("attention", "attention_backward_q", "attention_backward_kv")
CHECKED = [70, 5, 100]  # lengths of the examples that the best cut is checked on
REGISTERS = 200  # of a lane: cuts with more are not tried


def registers(cut: MatrixCut, kernel: str, head_size: int) -> float:
    """About as many as a lane of 32 holds: fragments of f16 and f32, and what is fetched."""
    left = cut.job_rows * head_size / 64
    sums = cut.out_rows * cut.out_columns / 32
    lanes = 32 * cut.subgroups(kernel, head_size)
    fetched = 2 * 4 * -(-cut.walk * head_size // 8 // lanes)
    return left + sums + fetched + cut.job_rows * cut.job_columns / 32


def cuts(device: Device, kernel: str, head_size: int) -> Iterator[MatrixCut]:
    """Those to try: whose subgroups all work in both rounds, within registers and memory."""
    shape = shape_on(device.facts) or EMULATED
    blocks, walks, sides = (16, 32, 64, 128), (32, 64), (16, 32, 64)
    columns = sorted({16, 32, 64, 128, head_size} & set(range(16, head_size + 1)))
    for block, walk, rows, across, out_rows, out_columns in itertools.product(
        blocks, walks, sides, sides, sides, columns
    ):
        cut = MatrixCut(block, walk, rows, across, out_rows, out_columns)
        if rows > block or out_rows > block or across > walk or rows * across > 1024:
            continue
        if not cut.fits(kernel, head_size, shape, device.facts):
            continue
        products, outputs = ROUNDS[kernel]
        jobs = products * (block // rows) * (walk // across)
        outs = outputs * (block // out_rows) * (head_size // out_columns)
        if jobs == outs and 2 <= jobs <= 8 and registers(cut, kernel, head_size) <= REGISTERS:
            yield cut


class Choosing:
    """`choose_cut`, but one cut, or None, for one kernel."""

    def __init__(self, kernel: str, cut: MatrixCut | None) -> None:
        self._kernel, self._cut = kernel, cut

    def __call__(self, which: str, *rest: Any) -> MatrixCut | None:
        return self._cut if which == self._kernel else choose_cut(which, *rest)


def seconds(program: Program, kernel: str, least: float = 0.004) -> float:
    """One launch of a kernel, in a program of many, by the median of its launches."""
    parts = (kernel, kernel.replace("attention", "attention_matrix"))
    times: list[float] = []
    began = time.perf_counter()
    while not times or time.perf_counter() - began < least:
        times += [t.seconds for t in program.time() if t.template in parts]
    return statistics.median(times)


def only(program: Program, kernel: str) -> Program:
    """The one kernel, so often that the GPU keeps its clock."""
    parts = (kernel, kernel.replace("attention", "attention_matrix"))
    one = [c for c in program.commands if isinstance(c, Dispatch) and c.template in parts]
    program.commands[:] = one * 20
    return program


def is_right(device: Device, shape: Shape) -> bool:
    """Whether the kernels as they are chosen now meet the reference on a few rows."""
    with device.arena() as memory:
        recording = device.recording(memory=memory)
        program, qkv, d_out, out, d_qkv = record(recording, shape, CHECKED, "f16")
        program.run()
        found = memory.read(out), memory.read(d_qkv)
    segments = segments_of(CHECKED)
    expected = (
        attention_reference(qkv, segments, shape)[0],
        attention_backward_reference(qkv, d_out, segments, shape),
    )
    return all(
        np.abs(ours - theirs).max() < 4 * 2**-11 * np.abs(theirs).max()
        for ours, theirs in zip(found, expected, strict=True)
    )


def measure(device: Device, run: str, kernel: str, repeats: int, most: int) -> list[dict[str, Any]]:
    """All cuts of one kernel and run, and the plain kernel, in turns."""
    name, text = run.split(":")
    shape = SHAPES[name]
    examples, length = (int(part) for part in text.split("x"))
    lengths = [length] * examples
    candidates: list[MatrixCut | None] = [None, *cuts(device, kernel, shape.head_size)]
    candidates = [cut for cut in candidates if cut is None or cut.block <= sum(lengths)][: most + 1]
    kernels: dict[str, tuple[str, dict[str, Any]]] = {}
    for cut in candidates:
        forward_attention.choose_cut = Choosing(kernel, cut)
        counted = record(
            device.recording(memory=CountingMemory(device.facts)), shape, lengths, "f16"
        )[0]
        for d in counted.commands:
            if isinstance(d, Dispatch):
                kernels[d.code] = (d.template, dict(d.constants))
    device.compile_all(kernels.values())
    found: list[list[float]] = [[] for _ in candidates]
    with device.arena() as memory:
        programs = []
        for cut in candidates:
            forward_attention.choose_cut = Choosing(kernel, cut)
            recording = device.recording(memory=memory)
            programs.append(only(record(recording, shape, lengths, "f16")[0], kernel))
        warm_up(programs[0], 0.0 if device.facts.is_cpu else 0.3)
        each = {"attention": 4, "attention_backward_q": 6, "attention_backward_kv": 8}[kernel]
        pairs = examples * visible_pairs(length, shape.window)
        flops = each * shape.head_size * shape.n_heads * pairs
        for _ in range(repeats):
            for times, program in zip(found, programs, strict=True):
                times.append(seconds(program, kernel))
    forward_attention.choose_cut = choose_cut
    present = choose_cut(kernel, device.recording(), sum(lengths), shape.n_heads, shape.head_size)
    print(f"\n{run} {kernel}: {len(candidates) - 1} cuts")
    figures = []
    order = sorted(zip(found, candidates, strict=True), key=lambda x: statistics.median(x[0]))
    for rank, (times, cut) in enumerate(order):
        us = 1e6 * statistics.median(times)
        figures.append(
            {"run": run, "kernel": kernel, "us": us, "TFLOPS": flops / us / 1e6,
             "cut": cut and asdict(cut)}
        )  # fmt: skip
        if rank < 6 or cut is None or cut == present:
            mark = "*" if cut == present else " "
            shown = "plain" if cut is None else tuple(asdict(cut).values())
            print(f" {mark}{us:9.1f} us {flops / us / 1e6:6.1f} TFLOP/s  {shown}")
    best = next(cut for _, cut in order if cut is not None)
    forward_attention.choose_cut = Choosing(kernel, best)
    print(f"  the best is {'right' if is_right(device, shape) else 'WRONG'}", flush=True)
    forward_attention.choose_cut = choose_cut
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    runs = ["llama1b:1x512", "llama1b:4x512", "llama8b:1x512", "llama8b:4x512"]
    parser.add_argument("--runs", nargs="+", default=runs, help="SHAPE:EXAMPLESxROWS")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--most", type=int, default=100, help="cuts of a kernel that are tried")
    parser.add_argument("--output", type=Path, help="a JSON file, written after every kernel")
    args = parser.parse_args()
    figures: list[dict[str, Any]] = []
    with Device() as device:
        print(f"{device.facts.name}, {device.facts.software}, {shape_on(device.facts)}")
        for run, kernel in itertools.product(args.runs, args.kernels):
            begun = time.perf_counter()
            figures += measure(device, run, kernel, args.repeats, args.most)
            print(f"  {time.perf_counter() - begun:.1f} s", flush=True)
            if args.output is not None:
                args.output.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
