"""Which tile of matmul_tiled, and into how many stretches a contraction is cut.

A model of the time of one product, fitted to 1,150 timings of 44 shapes on an H200
(benchmarks/matmul.py; there it chooses within 2% of the best on average): a step of a tile takes at
least its latency, and as long as the work of all workgroups that share a multiprocessor. The choice
depends on shapes and the device's limits only, so that one device always gives one result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

MULTIPROCESSORS = 132
_PRODUCT = 7.0  # microseconds of a dispatch beside its steps
_REDUCE = 3.3  # of the second pass
_REDUCE_MILLION = 0.56  # and for a million partial sums
_SPLITS = (1, 2, 4, 8)
_SHORTEST_SPLIT = 96
# A contraction over a vocabulary may be cut finer: a few rows of a head's gradient fill no GPU.
_FINE_SPLITS = (16, 32)
_SHORTEST_FINE_SPLIT = 2048


@dataclass(frozen=True)
class Tile:
    """Tunables of matmul_tiled: outputs of a workgroup, depth of a step, outputs of a lane.

    Attributes:
        latency: microseconds of a step however few workgroups there are.
        work: microseconds of a step for each workgroup of a multiprocessor.
    """

    tile_rows: int
    tile_columns: int
    depth: int
    lane_rows: int
    lane_columns: int
    latency: float = 0.0
    work: float = 0.0

    @property
    def workgroup_bytes(self) -> int:
        """Workgroup memory of the tiles of both sides."""
        return 4 * self.depth * (self.tile_rows + self.tile_columns)

    def constants(self) -> dict[str, int]:
        """What the template needs of it."""
        names = ("tile_rows", "tile_columns", "depth", "lane_rows", "lane_columns")
        return {name: getattr(self, name) for name in names}


# All but the last fit 16 KiB of workgroup memory and 256 lanes, WebGPU's defaults.
TILES = (
    Tile(32, 32, 32, 4, 4, 0.97, 0.39),
    Tile(32, 64, 32, 4, 4, 0.83, 0.59),
    Tile(64, 32, 32, 4, 4, 0.97, 0.55),
    Tile(64, 64, 16, 8, 4, 0.74, 0.51),
    Tile(64, 64, 32, 4, 4, 0.05, 1.29),
    Tile(64, 64, 32, 8, 4, 1.21, 1.06),
    Tile(64, 128, 16, 8, 8, 0.05, 0.93),
    Tile(128, 64, 16, 8, 8, 0.04, 0.98),
    Tile(128, 128, 16, 8, 8, 0.07, 2.15),
    Tile(128, 128, 32, 8, 8, 0.10, 3.52),
)


@cache
def choose_tile(
    rows: int, columns: int, contraction: int, workgroup_bytes: int
) -> tuple[Tile, int, int]:
    """The tile, the number of stretches and their length for one product.

    Args:
        rows: of the output.
        columns: of the output.
        contraction: length of each sum.
        workgroup_bytes: workgroup memory that the device has.
    """
    plans: list[tuple[float, int, Tile, int, int]] = []
    for tile in TILES:
        if tile.workgroup_bytes > workgroup_bytes:
            continue
        workgroups = -(-rows // tile.tile_rows) * -(-columns // tile.tile_columns)
        for wanted in (*_SPLITS, *_FINE_SPLITS):
            shortest = _SHORTEST_FINE_SPLIT if wanted in _FINE_SPLITS else _SHORTEST_SPLIT
            if wanted > 1 and contraction // wanted < shortest:
                break
            splits, length = cut(contraction, wanted, tile.depth)
            load = -(-workgroups * splits // MULTIPROCESSORS)
            time = _PRODUCT + length / tile.depth * max(tile.latency, load * tile.work)
            if splits > 1:
                time += _REDUCE + _REDUCE_MILLION * rows * columns * splits / 1e6
            plans.append((time, len(plans), tile, splits, length))
    _, _, tile, splits, length = min(plans)
    return tile, splits, length


def cut(contraction: int, splits: int, depth: int) -> tuple[int, int]:
    """Cuts a contraction into about `splits` stretches of whole steps.

    Returns:
        The number of stretches, and their length, a multiple of `depth`.
    """
    length = -(-contraction // (splits * depth)) * depth
    return -(-contraction // length), length
