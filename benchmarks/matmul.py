"""The quantized matmul over its tiles and splits: microseconds and TFLOP/s for real shapes.

    python benchmarks/matmul.py [--models smollm2,gemma3,llama1b] [--rows 128,512,2048] [--quick]

Prints, for each shape and direction, the best tile and splits, and what `choose_tile` would take;
writes all figures as JSON to --output. `--untrusted` compiles with wgpu's run-time checks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

sys.path.insert(0, str(Path(__file__).parent.parent))

import shaders.device
from backward.matmul import matmul_backward
from forward import matmul as module
from forward.gguf_file import GGUFTensor
from forward.matmul import matmul
from forward.matmul_tiles import TILES, Tile, choose_tile, cut
from forward.weights import load_matrix
from shaders.device import Device
from shaders.program import Program

# (out_features, in_features) of each product, and its type in the GGUFs that are compared.
MODELS = {
    "smollm2": [(960, 576, "Q4_1"), (576, 576, "Q4_1"), (3072, 576, "Q4_1"), (576, 1536, "Q4_1")],
    "gemma3": [(1536, 640, "Q5_0"), (640, 1024, "Q5_0"), (4096, 640, "Q5_0"), (640, 2048, "Q6_K")],
    "llama1b": [
        (3072, 2048, "Q4_K"),
        (2048, 2048, "Q4_K"),
        (16384, 2048, "Q4_K"),
        (2048, 8192, "Q6_K"),
    ],
    "head": [(49152, 576, "Q8_0")],
    "square": [(4096, 4096, "F16"), (4096, 4096, "Q4_K")],
}
REPEATS = 6  # products in a row of one timed program


def record_product(
    device: Device, matrix: Any, rows: int, transposed: bool, tile: Tile, splits: int
) -> Program:
    """A program of some products in a row with one tile and one number of splits."""
    extent = device.extent(rows)
    widths = (matrix.in_features, matrix.out_features)
    if transposed:
        widths = widths[::-1]
    source = device.empty((rows, widths[0]), extent=extent)
    result = device.empty((rows, widths[1]), extent=extent)
    device.write(source, np.random.default_rng(0).normal(size=source.shape))
    module.choose_tile = lambda rows, columns, contraction, limit: (
        tile,
        *cut(contraction, splits, tile.depth),
    )
    try:
        program = Program(device)
        for _ in range(REPEATS):
            if transposed:
                matmul_backward(program, source, matrix, out=result)
            else:
                matmul(program, source, matrix, out=result)
    finally:
        module.choose_tile = choose_tile
    return program


class Spin:
    """Keeps a GPU at its working clock: an idle one takes a while to speed up."""

    def __init__(self, device: Device) -> None:
        self.device = device
        kind = GGMLQuantizationType.F16
        n = 64 if device.is_cpu else 4096
        data = _random_rows(np.random.default_rng(0), kind, n, n)
        matrix = load_matrix(device, [GGUFTensor("spin", kind, (n, n), data)])
        tile = next(t for t in TILES if t.tile_rows == 128)
        self.program = record_product(device, matrix, n, False, tile, 1)

    def run(self, seconds: float) -> None:
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            self.program.run()
            self.device.read(self.device.uniform())


def microseconds(program: Program, spin: Spin) -> float:
    """One product, all its passes: the median of several in a row, the best of three times."""
    best = []
    for _ in range(3):
        spin.program.run()
        times = [kernel.seconds for kernel in program.time()]
        passes = len(times) // REPEATS
        sums = [sum(times[i * passes : (i + 1) * passes]) for i in range(1, REPEATS)]
        best.append(statistics.median(sums))
    return 1e6 * min(best)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="smollm2,head")
    parser.add_argument("--rows", default="128,512,2048")
    parser.add_argument("--tiles", default="", help="indices into TILES")
    parser.add_argument("--untrusted", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    if options.untrusted:
        shaders.device.trusted_shader_module = lambda device, label, code: (
            device.create_shader_module(label=label, code=code)
        )
    device = Device()
    device.matmul_body = "tiled"
    limit = device.workgroup_memory
    tiles = [TILES[int(i)] for i in options.tiles.split(",")] if options.tiles else TILES
    tiles = [tile for tile in tiles if tile.workgroup_bytes <= limit]
    rng = np.random.default_rng(0)
    spin = Spin(device)
    figures = []
    began = time.perf_counter()
    for name in options.models.split(","):
        for n_out, n_in, kind_name in MODELS[name]:
            kind = GGMLQuantizationType[kind_name]
            data = _random_rows(rng, kind, n_out, n_in)
            matrix = load_matrix(device, [GGUFTensor("w", kind, (n_out, n_in), data)])
            for rows in map(int, options.rows.split(",")):
                for transposed in (False, True):
                    columns, contraction = (n_in, n_out) if transposed else (n_out, n_in)
                    shape = f"{rows}x{columns}x{contraction} {kind_name}"
                    shape += " to the input" if transposed else ""
                    flops = 2 * rows * n_out * n_in
                    row, programs = [], []
                    for tile in tiles:
                        grid = -(-columns // tile.tile_columns) * -(-rows // tile.tile_rows)
                        for splits in (1, 2, 4, 8):
                            if splits > 1 and (grid >= 264 or grid * splits > 1100):
                                continue
                            if (
                                contraction // splits < 96
                                or time.perf_counter() - began > options.seconds
                            ):
                                continue
                            program = record_product(device, matrix, rows, transposed, tile, splits)
                            programs.append((program, tile, splits))
                    spin.run(0.2)
                    for program, tile, splits in programs:
                        us = microseconds(program, spin)
                        row.append((us, tile, splits))
                        figures.append(
                            tile.constants() | {"shape": shape, "splits": splits, "us": us}
                        )
                    if not row:
                        continue
                    row.sort(key=lambda entry: entry[0])
                    best = "; ".join(
                        f"{us:.0f} us {flops / us / 1e6:.1f} {_name(tile)}/{splits}"
                        for us, tile, splits in row[:3]
                    )
                    default, splits, _ = choose_tile(rows, columns, contraction, limit)
                    chosen = [
                        us
                        for us, tile, n in row
                        if tile == default and cut(contraction, n, tile.depth)[0] == splits
                    ]
                    print(
                        f"{shape}: {best} | chosen {_name(default)}/{splits} "
                        f"{chosen[0] if chosen else float('nan'):.0f} us",
                        flush=True,
                    )
    if options.output:
        options.output.write_text(json.dumps(figures))


def _name(tile: Tile) -> str:
    sizes = (tile.tile_rows, tile.tile_columns, tile.depth)
    return "·".join(map(str, sizes)) + f"·{tile.lane_rows}×{tile.lane_columns}"


def _random_rows(
    rng: np.random.Generator, kind: GGMLQuantizationType, rows: int, columns: int
) -> np.ndarray:
    """Bytes of a matrix whose scales are ordinary numbers."""
    from tests.forward.test_quantization import random_blocks

    return random_blocks(kind, rows, columns)


if __name__ == "__main__":
    main()
