"""The attention kernels over their tiles: microseconds a dispatch, on whatever GPU there is.

Checks every tile against float64 numpy on a few rows of the same heads first, then times it. Prints
the tiles of each kernel and workload, fastest first, a `*` at what `choose_tile` takes, and at the
end rows for `GPU_TILES` of forward/attention.py. Writes all figures to $OUT/attention.json, where
OUT is set.

    python benchmarks/attention.py [--runs smollm2:1x512 gemma3:4x512] [--types f16 f32]
        [--kernels attention attention_backward_q attention_backward_kv] [--split 0] [--seconds 58]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from lora.backward import attention as backward_attention
from lora.backward.attention import Attended, attention_backward, choose_split
from lora.checks.references.attention import (
    Shape,
    attention_backward_reference,
    attention_reference,
    segments_of,
)
from lora.forward import attention as forward_attention
from lora.forward.attention import Tile, attention, choose_tile
from lora.forward.heads import Heads
from lora.shaders.device import Device
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

SHAPES = {
    "smollm2": Shape(9, 3, 64, 64**-0.5),
    "gemma3": Shape(4, 1, 256, 256**-0.5, window=512),
    "gemma4": Shape(8, 1, 512, 512**-0.5),  # layers of E2B that see all
    "llama": Shape(32, 8, 64, 64**-0.5),
    "tiny": Shape(2, 1, 64, 64**-0.5),  # for a look at this script on a CPU device
}
KERNELS = ("attention", "attention_backward_q", "attention_backward_kv")
ACCUMULATORS = 128  # of a lane: tiles with more are not tried
CHECKED = [40, 5, 70]  # lengths of the examples that a tile is checked on

# teams, lanes of a team, slices, chunk, rows a lane.
CUTS: dict[int, list[tuple[int, int, int, int, int]]] = {
    64: [
        *itertools.product((1, 2, 4), (64,), (1,), (16,), (2, 4)),
        *itertools.product((1, 2, 4), (64,), (2,), (16,), (4, 8)),
    ],
    256: [
        *itertools.product((1, 2), (64,), (1,), (16,), (1, 2)),
        *itertools.product((1, 2), (128,), (2,), (16,), (2, 4)),
        *itertools.product((1, 2), (128,), (4,), (32,), (4, 8)),
        *itertools.product((1,), (256,), (4,), (32,), (2, 4)),
        *itertools.product((1,), (256,), (8,), (64,), (4, 8)),
    ],
    512: [
        *itertools.product((1, 2), (128,), (4,), (32,), (1, 2, 4)),
        *itertools.product((1,), (256,), (4,), (32,), (1, 2)),
        *itertools.product((1,), (256,), (8,), (64,), (2, 4, 8)),
    ],
}


def record(
    recording: Recording, shape: Shape, lengths: list[int], dtype: str
) -> tuple[Program, np.ndarray, np.ndarray, Tensor, Tensor]:
    """Forward and backward of one layer: the program, qkv, d_out, and on the device out, d_qkv."""
    rows = sum(lengths)
    extent = recording.memory.extent(rows)
    rng = np.random.default_rng(rows)
    x = recording.memory.empty((rows, shape.width), dtype, extent=extent)
    d_y = recording.memory.empty((rows, shape.n_heads * shape.head_size), dtype, extent=extent)
    qkv, d_out = (rng.normal(size=tensor.shape).astype(x.numpy_dtype) for tensor in (x, d_y))
    recording.memory.write(x, qkv)
    recording.memory.write(d_y, d_out)
    segments = recording.memory.upload(segments_of(lengths))
    program = Program(recording)
    heads = Heads(**shape.options)
    out, lse = attention(program, x, segments, heads)
    d_x = attention_backward(program, Attended(x, out, lse), d_y, segments, heads)
    return program, qkv, d_out, out, d_x


def is_right(
    device: Device, shape: Shape, dtype: str, references: dict[Any, list[np.ndarray]]
) -> bool:
    """Whether the kernels as they are chosen now meet the reference on a few rows."""
    with device.arena() as memory:
        recording = device.recording(memory=memory)
        program, qkv, d_out, out, d_qkv = record(recording, shape, CHECKED, dtype)
        program.run()
        found = memory.read(out), memory.read(d_qkv)
    if (shape, dtype) not in references:
        segments = segments_of(CHECKED)
        references[shape, dtype] = [
            attention_reference(qkv, segments, shape)[0],
            attention_backward_reference(qkv, d_out, segments, shape),
        ]
    bound = 16 * 2**-11 if dtype == "f16" else 1e-5  # as in the tests, and some
    return all(
        np.abs(values - expected).max() < bound * np.abs(expected).max()
        for values, expected in zip(found, references[shape, dtype], strict=True)
    )


def tiles(device: Device, kernel: str, head_size: int, dtype: str) -> list[Tile]:
    """The tiles to try, as far as they fit device, registers and kernel."""
    found = []
    for teams, lanes, slices, chunk, per_lane in CUTS[head_size]:
        for half in (True, False) if dtype == "f16" else (False,):
            held = Tile(teams, lanes, per_lane, chunk, slices=slices, half=half)
            for tile in (held, replace(held, held=False)):
                if (
                    tile.cuts(head_size)
                    and tile.block <= 32
                    and tile.teams * tile.team_lanes <= 256
                    and tile.accumulators(kernel, head_size) <= ACCUMULATORS
                    and tile.memory(kernel, head_size, dtype) <= device.facts.workgroup_memory
                ):
                    found.append(tile)
                    break
    return found


def choosing(kernel: str, tile: Tile) -> Callable[..., Tile]:
    """`choose_tile`, but that one tile for that kernel."""
    return lambda which, *rest: tile if which == kernel else choose_tile(which, *rest)


def warm_up(program: Program, seconds: float) -> None:
    """Keeps a GPU busy for a while: an idle one takes that long to speed up."""
    memory = program.recording.memory
    probe = memory.uniform()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            program.run()
        memory.read(probe)


def microseconds(program: Program, kernel: str, repeats: int) -> float:
    """One call of a kernel, with the sum that follows it where there is one: the median."""
    warm_up(program, 0.02)
    parts = (kernel, kernel + "_sum")
    return 1e6 * statistics.median(
        sum(d.seconds for d in program.time() if d.template in parts) for _ in range(repeats)
    )


def row_of(tile: Tile) -> str:
    """The tile as Python, without what is so by default."""
    changed = [field for field in fields(tile) if getattr(tile, field.name) != field.default]
    return f"Tile({', '.join(f'{f.name}={getattr(tile, f.name)}' for f in changed)})"


def print_rows(figures: list[dict[str, Any]]) -> None:
    """Of each row of GPU_TILES, the tile that is best over the runs, whatever rows a lane takes."""
    best: dict[tuple[str, str, int], dict[Tile, dict[str, tuple[float, int]]]] = {}
    for figure in figures:
        family = replace(figure["tile"], per_lane=1, held=True)
        runs = best.setdefault(figure["row"], {}).setdefault(family, {})
        runs[figure["run"]] = min(
            runs.get(figure["run"], (np.inf, 0)), (figure["us"], figure["tile"].per_lane)
        )
    print("\nrows for GPU_TILES (the tile within the least factor of each run's best):")
    for row, families in best.items():
        names = {run for runs in families.values() for run in runs}
        least = {run: min(runs[run] for runs in families.values() if run in runs) for run in names}
        complete = {family: runs for family, runs in families.items() if runs.keys() == names}
        if not complete:
            continue
        family, runs = min(
            complete.items(),
            key=lambda item: sum(item[1][run][0] / least[run][0] for run in names),
        )
        most = max(per_lane for _, per_lane in runs.values())
        tile = next(
            f["tile"]
            for f in figures
            if f["row"] == row
            and f["tile"].per_lane == most
            and replace(f["tile"], per_lane=1, held=True) == family
        )
        times = "; ".join(f"{run} {us:.0f} us at per_lane {n}" for run, (us, n) in runs.items())
        print(f"    {row}: {row_of(tile)},  # {times}".replace("'", '"'))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    runs = ["smollm2:1x512", "gemma3:4x512", "smollm2:4x512", "llama:1x512"]
    parser.add_argument("--runs", nargs="+", default=runs, help="SHAPE:EXAMPLESxROWS")
    parser.add_argument("--types", nargs="+", choices=["f16", "f32"], default=["f16", "f32"])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--split", type=int, choices=[0, 1], default=None, help="as chosen if not")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=58.0, help="stop after that long")
    args = parser.parse_args()
    device = Device()
    print(f"{device.facts.name}, {device.facts.workgroup_memory} bytes of workgroup memory")
    stop = time.perf_counter() + args.seconds
    references: dict[Any, list[np.ndarray]] = {}
    figures: list[dict[str, Any]] = []
    if args.split is not None:
        backward_attention.choose_split = lambda *_: bool(args.split)

    with device.arena() as memory:
        program = record(device.recording(memory=memory), SHAPES["tiny"], [512], "f32")[0]
        warm_up(program, 0.0 if device.facts.is_cpu else 1.0)
    for dtype, run, kernel in itertools.product(args.types, args.runs, args.kernels):
        if dtype == "f16" and "shader-f16" not in device.facts.features:
            continue
        name, text = run.split(":")
        shape = SHAPES[name]
        examples, length = (int(part) for part in text.split("x"))
        rows, heads = examples * length, shape.n_heads
        split = args.split
        if split is None:
            split = choose_split(device.recording(), rows, heads, shape.n_kv_heads, dtype)
        split = split and kernel == "attention_backward_kv"
        owners = shape.n_kv_heads if kernel == "attention_backward_kv" and not split else heads
        present = choose_tile(kernel, device.recording(), rows, owners, shape.head_size, dtype)
        timed: list[tuple[float, Tile]] = []
        for tile in dict.fromkeys([present, *tiles(device, kernel, shape.head_size, dtype)]):
            if time.perf_counter() > stop:
                break
            forward_attention.choose_tile = choosing(kernel, tile)
            try:
                if not is_right(device, shape, dtype, references):
                    print(f"{run} {kernel} {dtype}: {tile} is WRONG", flush=True)
                    continue
                with device.arena() as memory:
                    recording = device.recording(memory=memory)
                    program = record(recording, shape, [length] * examples, dtype)[0]
                    timed.append((microseconds(program, kernel, args.repeats), tile))
            finally:
                forward_attention.choose_tile = choose_tile
        print(f"\n{run} {kernel} {dtype}{' split' if split else ''}")
        for us, tile in sorted(timed, key=lambda entry: entry[0]):
            mark = "*" if tile == present else " "
            print(f" {mark}{us:8.1f} us {tile.workgroups(rows, owners):5} wg  {row_of(tile)}")
            row = (kernel, dtype, shape.head_size)
            figures.append({"row": row, "run": run, "us": us, "tile": tile})
        sys.stdout.flush()
    if time.perf_counter() > stop:
        print("\nout of time: ask for fewer runs, types or kernels")
    print_rows(figures)
    if "OUT" in os.environ:
        table = [figure | {"tile": asdict(figure["tile"])} for figure in figures]
        (Path(os.environ["OUT"]) / "attention.json").write_text(json.dumps(table))


if __name__ == "__main__":
    main()
