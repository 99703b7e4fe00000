"""Whether decoded weights should lie in the order of fragments: a probe, no kernel of the product.

matmul_matrix.wgsl fetches both sides into workgroup memory and loads fragments from there; on an
H200 the way through memory bounds it (docs/log.md). Weights that are decoded beforehand could be
written in any order: here fragments lie whole, one after the other, and subgroups load them from
memory, W alone or both sides, with the next ones loaded ahead or not.

    LORA_WEBGPU=dawn python benchmarks/fragment_order.py [--sizes 4096x4096x4096,…] [--output FILE]

Every variant's result is compared with float64's on the way. A size is rows × columns ×
contraction; the median of passes of 5 ms counts, variants in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from lora.forward.plans.workbench import Stopwatch
from lora.shaders.device import Device
from lora.shaders.facts import MatrixShape
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

SIZES = "4096x4096x4096,2048x8192x2048,2048x28672x4096,512x28672x4096"
_PASS_SECONDS = 5e-3
_ROUNDS = 7
_CHECKED = 64  # rows and columns of the result, at both ends


@dataclass(frozen=True)
class Variant:
    """A kernel: outputs of a workgroup and of a subgroup, steps at a time, where sides lie."""

    tile_rows: int = 128
    tile_columns: int = 128
    team_rows: int = 64
    team_columns: int = 64
    depth: int = 32
    x_in_order: bool = False
    w_in_order: bool = True
    ahead: bool = False
    band: int = 8

    @property
    def name(self) -> str:
        """As tables say it."""
        tile = f"{self.tile_rows}x{self.tile_columns}x{self.depth}"
        sides = [s for s, there in (("x", self.x_in_order), ("w", self.w_in_order)) if there]
        order = f"{' and '.join(sides)} in order" if sides else "both through workgroup memory"
        return f"{tile}/{self.team_rows}x{self.team_columns}, {order}{', ahead' * self.ahead}"


VARIANTS = (
    Variant(w_in_order=False),
    Variant(),
    Variant(ahead=True),
    Variant(x_in_order=True),
    Variant(x_in_order=True, ahead=True),
    Variant(depth=64),
    Variant(tile_rows=256, tile_columns=64),
    Variant(tile_rows=256),
    Variant(tile_columns=256),
    Variant(tile_rows=64, tile_columns=256),
    Variant(team_columns=32),
)


def in_order(matrix: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """f16 [M, K] as fragments of rows × columns, each whole, one after the other along K."""
    blocks = matrix.reshape(len(matrix) // rows, rows, matrix.shape[1] // columns, columns)
    return np.ascontiguousarray(blocks.transpose(0, 2, 1, 3)).reshape(matrix.shape)


def words(matrix: np.ndarray) -> np.ndarray:
    """f16 [M, K] as u32 [M, K / 2]."""
    return np.ascontiguousarray(matrix, np.float16).view(np.uint32)


class Bench:
    """One product's sides, in both orders, and what came out."""

    def __init__(
        self, recording: Recording, shape: MatrixShape, size: tuple[int, int, int]
    ) -> None:
        self._recording, self._shape, self.size = recording, shape, size
        m, n, k = size
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(m, k)).astype(np.float16)
        self.w = rng.normal(size=(n, k)).astype(np.float16)
        sides = {
            ("x", False): self.x, ("x", True): in_order(self.x, shape.m, shape.k),
            ("w", False): self.w, ("w", True): in_order(self.w, shape.n, shape.k),
        }  # fmt: skip
        upload = recording.memory.upload
        self._sides = {key: upload(words(side), purpose="sides") for key, side in sides.items()}
        self.out: Tensor = recording.memory.empty((m, n))

    def program(self, variant: Variant) -> Program:
        """The variant on these sides."""
        m, n, k = self.size
        shape = self._shape
        template = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined)
        code = template.from_string(Path(__file__).with_suffix(".wgsl").read_text()).render(
            m=shape.m, n=shape.n, k=shape.k, subgroup_lanes=shape.most_lanes, N=n, K=k,
            **asdict(variant),
        )  # fmt: skip
        tiles = m // variant.tile_rows * (n // variant.tile_columns)
        program = Program(self._recording)
        sides = [self._sides["x", variant.x_in_order], self._sides["w", variant.w_in_order]]
        program.dispatch_wgsl(variant.name, code, [*sides, self.out], tiles)
        return program

    def fits(self, variant: Variant) -> bool:
        """Whether tiles divide the product, and bands its rows."""
        rows, columns = self.size[0] // variant.tile_rows, self.size[1] // variant.tile_columns
        whole = rows * variant.tile_rows == self.size[0]
        return whole and columns * variant.tile_columns == self.size[1] and rows % variant.band == 0

    def error(self) -> float:
        """The largest error of some corners, of the largest number there."""
        found = self._recording.memory.read(self.out)
        corners = (slice(_CHECKED), slice(-_CHECKED, None))
        worst = 0.0
        for rows in corners:
            for columns in corners:
                wanted = self.x[rows].astype(np.float64) @ self.w[columns].astype(np.float64).T
                difference = np.abs(found[rows, columns] - wanted).max()
                worst = max(worst, float(difference / np.abs(wanted).max()))
        return worst


def measure(bench: Bench, watch: Stopwatch) -> list[dict[str, Any]]:
    """Every variant that fits, the quickest first."""
    variants = [variant for variant in VARIANTS if bench.fits(variant)]
    programs = [bench.program(variant) for variant in variants]
    errors = []
    for program in programs:
        program.run()
        errors.append(bench.error())
    once = watch(programs[:1], 3)[0]
    repeats = max(1, round(_PASS_SECONDS / once))
    watch(programs[:1], max(1, round(0.5 / once)))
    times: list[list[float]] = [[] for _ in programs]
    for turn in range(_ROUNDS):
        order = [(turn + i) % len(programs) for i in range(len(programs))]
        measured = watch([programs[i] for i in order], repeats)
        for index, value in zip(order, measured, strict=True):
            times[index].append(value)
    flops = 2 * bench.size[0] * bench.size[1] * bench.size[2]
    rows = [
        {"variant": variant.name, "us": 1e6 * statistics.median(values),
         "TFLOP/s": 1e-12 * flops / statistics.median(values), "error": error}
        for variant, values, error in zip(variants, times, errors, strict=True)
    ]  # fmt: skip
    return sorted(rows, key=lambda row: row["us"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with Device() as device:
        facts = device.facts
        shapes = [s for s in facts.matrix_shapes if (s.inputs, s.result) == ("f16", "f32")]
        if not shapes:
            raise SystemExit(f"{facts.name} has no matrix units for f16 that sum in f32.")
        print(f"{facts.name}, {facts.info['description']}, {facts.software}, {shapes[0]}")
        for size in options.sizes.split(","):
            with device.memory.inner() as memory:
                recording = Recording(facts, memory, "f16")
                rows, columns, contraction = map(int, size.split("x"))
                bench = Bench(recording, shapes[0], (rows, columns, contraction))
                found[size] = measure(bench, Stopwatch(device, _PASS_SECONDS))
            print(size)
            for row in found[size]:
                print(
                    f"    {row['variant']:58} {row['us']:9.1f} us {row['TFLOP/s']:7.1f} TFLOP/s"
                    f"  error {row['error']:.1e}",
                    flush=True,
                )
    if options.output:
        about = {"adapter": facts.name, "driver": facts.info["description"]}
        text = json.dumps({**about, "software": facts.software, "sizes": found}, indent=1)
        options.output.write_text(text)


if __name__ == "__main__":
    main()
