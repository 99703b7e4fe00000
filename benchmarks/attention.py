"""The attention kernels over their tiles: microseconds a dispatch, on whatever GPU there is.

Checks every tile against float64 numpy on a few rows of the same heads first, then times it. A `*`
marks what `choose_tile` takes; the constants at the top of forward/attention.py and `SPLIT_BELOW`
of backward/attention.py are set from this table.

    python benchmarks/attention.py [--shapes smollm2 gemma3] [--lengths 1x512 4x512]
        [--teams 1 2 4] [--team-lanes 64 128] [--per-lane 1 2 4] [--unroll 4 16] [--seconds 55]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import backward.attention
import forward.attention
from backward.attention import attention_backward
from forward.attention import Tile, attention, choose_tile, workgroup_memory
from shaders.device import Device
from shaders.program import Program
from shaders.tensor import Tensor
from tests.backward.test_attention import attention_backward_reference
from tests.forward.test_attention import Shape, attention_reference, segments_of

SHAPES = {
    "smollm2": Shape(9, 3, 64, 64**-0.5),
    "gemma3": Shape(4, 1, 256, 256**-0.5, window=512),
    "llama": Shape(32, 8, 64, 64**-0.5),
}
KERNELS = ("attention", "attention_backward_q", "attention_backward_kv")
ACCUMULATORS = 128  # of a lane: tiles with more are not tried


def record(
    device: Device, shape: Shape, lengths: list[int]
) -> tuple[Program, np.ndarray, np.ndarray, Tensor, Tensor]:
    """Forward and backward of one layer: the program, qkv, d_out, and on the device out, d_qkv."""
    rows = sum(lengths)
    extent = device.extent(rows)
    rng = np.random.default_rng(rows)
    qkv = rng.normal(size=(rows, shape.width)).astype(np.float32)
    d_out = rng.normal(size=(rows, shape.n_heads * shape.head_size)).astype(np.float32)
    x, d_y = (device.empty(array.shape, extent=extent) for array in (qkv, d_out))
    device.write(x, qkv)
    device.write(d_y, d_out)
    segments = device.upload(segments_of(lengths))
    program = Program(device)
    out, lse = attention(program, x, segments, **shape.options)
    d_x = attention_backward(program, x, out, lse, d_y, segments, **shape.options)
    return program, qkv, d_out, out, d_x


def check(device: Device, shape: Shape) -> None:
    """Stops where the kernels as they are chosen now miss the reference on a few rows."""
    lengths = [40, 5, 70]
    program, qkv, d_out, out, d_qkv = record(device, shape, lengths)
    program.run()
    segments = segments_of(lengths)
    for name, found, expected in (
        ("attention", out, attention_reference(qkv, segments, shape)[0]),
        ("backward", d_qkv, attention_backward_reference(qkv, d_out, segments, shape)),
    ):
        error = np.abs(device.read(found) - expected).max() / np.abs(expected).max()
        if not error < 1e-5:  # f32 sums of head_size products, as in the tests
            raise SystemExit(f"{name} of {shape} is off by {error:.1e}")


def tiles(args: argparse.Namespace, device: Device, kernel: str, head_size: int) -> list[Tile]:
    """What the command line asks for, as far as it fits device, registers and kernel."""
    groups = -(-head_size // 32)
    sums = 2 if kernel == "attention_backward_kv" else 1
    found = []
    for teams, lanes, per_lane, chunk, held, prefetch, unroll in itertools.product(
        args.teams,
        args.team_lanes,
        args.per_lane,
        args.chunk,
        args.held,
        args.prefetch,
        args.unroll,
    ):
        tile = Tile(teams, lanes, per_lane, chunk, bool(held), bool(prefetch), unroll)
        if (
            tile.block <= 32
            and teams * lanes <= 256
            and unroll <= chunk <= 8 * groups
            and groups * 4 * per_lane * sums <= ACCUMULATORS
            and tile.memory(kernel, head_size) <= workgroup_memory(device)
        ):
            found.append(tile)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["smollm2", "gemma3"])
    parser.add_argument("--lengths", nargs="+", default=["1x512", "4x512"], help="EXAMPLESxROWS")
    parser.add_argument("--teams", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--team-lanes", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--per-lane", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--chunk", nargs="+", type=int, default=[16])
    parser.add_argument("--held", nargs="+", type=int, default=[1], help="0, 1 or both")
    parser.add_argument("--prefetch", nargs="+", type=int, default=[1], help="0, 1 or both")
    parser.add_argument("--unroll", nargs="+", type=int, default=[4])
    parser.add_argument("--split", nargs="+", type=int, default=[0, 1], help="0, 1 or both")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=55.0, help="stop after that long")
    args = parser.parse_args()
    device = Device()
    print(f"{device.name}, {workgroup_memory(device)} bytes of workgroup memory")
    stop = time.perf_counter() + args.seconds
    original = choose_tile, backward.attention.choose_split

    for name, kernel in itertools.product(args.shapes, KERNELS):
        shape = SHAPES[name]
        splits = args.split if kernel == "attention_backward_kv" else [0]
        for tile, split in itertools.product(tiles(args, device, kernel, shape.head_size), splits):
            if time.perf_counter() > stop:
                print("out of time: ask for fewer variants")
                return

            def chosen(which: str, *rest: object, tile: Tile = tile, kernel: str = kernel) -> Tile:
                return tile if which == kernel else original[0](which, *rest)

            if kernel == "attention_backward_kv":
                backward.attention.choose_split = lambda *_, split=split: bool(split)
            forward.attention.choose_tile = chosen
            try:
                check(device, shape)
                times = []
                for text in args.lengths:
                    examples, rows = (int(part) for part in text.split("x"))
                    program = record(device, shape, [rows] * examples)[0]
                    program.time()
                    seconds: dict[str, list[float]] = {}
                    for _ in range(args.repeats):
                        for dispatch in program.time():
                            seconds.setdefault(dispatch.template, []).append(dispatch.seconds)
                    mine = [key for key in seconds if key == kernel or key.startswith(kernel + "_")]
                    if kernel == "attention":
                        mine = [kernel]
                    microseconds = sum(1e6 * statistics.median(seconds[key]) for key in mine)
                    owners = shape.n_heads
                    if kernel == "attention_backward_kv" and not split:
                        owners = shape.n_kv_heads
                    default = original[0](kernel, device, examples * rows, owners, shape.head_size)
                    times.append(f"{text} {microseconds:8.1f}{'*' if default == tile else ' '}")
            finally:
                forward.attention.choose_tile, backward.attention.choose_split = original
            print(
                f"{name:8} {kernel:22} teams {tile.teams} lanes {tile.team_lanes:3} "
                f"per_lane {tile.per_lane} chunk {tile.chunk:2} held {tile.held:d} "
                f"prefetch {tile.prefetch:d} unroll {tile.unroll:2} split {split}  "
                + "  ".join(times),
                flush=True,
            )


if __name__ == "__main__":
    main()
