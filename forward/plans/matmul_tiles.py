"""Which tile of matmul_tiled, and into how many stretches a contraction is cut.

A model of the time of one product, fitted to 3,900 timings of 100 products on an H200
(benchmarks/matmul.py; there it chooses within 2.4% of the best in f32, 1.6% in f16, on average): a
step of a tile takes at least its latency, and as long as the work of all workgroups that share a
multiprocessor. Its choice depends on shapes and the device's limits only; forward/plans/tuning.py
times its best few.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

from lora.shaders.facts import MULTIPROCESSORS

_PRODUCT = 7.0  # microseconds of a dispatch beside its steps
_REDUCE = 2.5  # of the second pass
_REDUCE_MILLION = 0.5  # and for a million partial sums
_SPLITS = (1, 2, 4, 8)
_SHORTEST_SPLIT = 96
# A contraction over a vocabulary may be cut finer: a few rows of a head's gradient fill no GPU. And
# so that workgroups are as many as go round the multiprocessors a few times: of 132 a fifth is idle
# with 320 workgroups (20 tiles in 16 stretches), next to none with 260 (in 13).
_FINE_SPLITS = (16, 32)
_SHORTEST_FINE_SPLIT = 2048
_MOST_ROUNDS = 6
_PAD = 8  # f16 between the rows of a tile on matrix units, off each other's banks
_MOST_FRAGMENT = 256  # outputs of a fragment
MOST_PARTIAL_SUMS = 12 << 20  # of all stretches: memory that every session would hold
MOST_CANDIDATES = 8  # of one product, to be timed


@dataclass(frozen=True)
class Tile:
    """Tunables of matmul_tiled: outputs of a workgroup, depth of a step, outputs of a lane.

    Attributes:
        latency: microseconds of a step however few workgroups there are.
        work: microseconds of a step for each workgroup of a multiprocessor.
        item_bytes: bytes of a number in workgroup memory: 4, or 2 under `precision: f16`.
        buffers: 1, or 2 where the next tiles are stored while these are multiplied.
    """

    tile_rows: int
    tile_columns: int
    depth: int
    lane_rows: int
    lane_columns: int
    latency: float = 0.0
    work: float = 0.0
    item_bytes: int = 4
    buffers: int = 1
    body: ClassVar[str] = "tiled"  # a name of forward/matmul_bodies.py
    weight_time: ClassVar[float] = 0.0  # microseconds for each million weights, beside its steps
    input_time: ClassVar[float] = 0.0  # and for each million numbers of x
    least_cut: ClassVar[int] = 0  # weights of the smallest matrix that it takes in stretches

    def may_cut(self, columns: int, contraction: int) -> bool:
        """Whether it takes a matrix of so many outputs and terms in stretches."""
        return columns * contraction >= self.least_cut

    @property
    def workgroup_bytes(self) -> int:
        """Workgroup memory of the tiles of both sides."""
        return self.buffers * self.item_bytes * self.depth * (self.tile_rows + self.tile_columns)

    @property
    def name(self) -> str:
        """Its sizes, as files and tables name it: 64x128x16/8x8."""
        tile = f"{self.tile_rows}x{self.tile_columns}x{self.depth}"
        double = " double" if self.buffers == 2 else ""
        return f"{tile}/{self.lane_rows}x{self.lane_columns}{double}"

    def constants(self) -> dict[str, int]:
        """What the template needs of it."""
        names = ("tile_rows", "tile_columns", "depth", "lane_rows", "lane_columns", "buffers")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class MatrixTile(Tile):
    """Tunables of matmul_matrix: `lane_rows` and `lane_columns` are outputs of a subgroup.

    Always of f16. A subgroup's 64 × 64 outputs are 128 registers of each lane of 32.
    """

    item_bytes: int = 2
    body: ClassVar[str] = "matrix"

    @property
    def workgroup_bytes(self) -> int:
        """Workgroup memory: tiles whose rows have 16 bytes more, and a fragment of each subgroup.

        Little is left on purpose: with fragments of 16 KiB an H100 ran one workgroup a
        multiprocessor instead of two, at half the speed (docs/log.md).
        """
        x, w = self.tile_rows * (self.depth + _PAD), self.tile_columns * (self.depth + _PAD)
        w = max(w, self.depth * (self.tile_columns + _PAD))
        subgroups = self.tile_rows // self.lane_rows * (self.tile_columns // self.lane_columns)
        return self.item_bytes * (x + w) + 4 * subgroups * _MOST_FRAGMENT

    @property
    def name(self) -> str:
        """Its sizes, as files and tables name it: matrix 128x128x32/64x64."""
        return f"matrix {super().name}"

    def constants(self) -> dict[str, int]:
        """What the template needs of it."""
        return {
            "tile_rows": self.tile_rows,
            "tile_columns": self.tile_columns,
            "depth": self.depth,
            "subgroup_rows": self.lane_rows,
            "subgroup_columns": self.lane_columns,
            "pad": _PAD,
        }


@dataclass(frozen=True)
class DecodedTile(MatrixTile):
    """As those, of weights that are decoded beforehand, into scratch memory."""

    body: ClassVar[str] = "decoded"
    weight_time: ClassVar[float] = 0.9  # half a byte read and two written, at 3 TB/s
    # A decoding of its own costs a smaller one more than it gives. The larger ones of few rows and
    # columns fill a GPU in stretches alone: 512 × 4096 of 28,672 are 128 workgroups.
    least_cut: ClassVar[int] = 8 << 20

    @property
    def name(self) -> str:
        """Its sizes, as files and tables name it: decoded matrix 128x128x32/64x64."""
        return f"decoded {super().name}"


@dataclass(frozen=True)
class PairedTile(MatrixTile):
    """As MatrixTile, of f32 that are pairs of f16: a subgroup's outputs are two sums each.

    Its fragments hold one, its lanes another: 64 × 32 outputs are 128 registers.
    """

    item_bytes: int = 4
    body: ClassVar[str] = "paired"

    @property
    def name(self) -> str:
        """Its sizes, as files and tables name it: paired matrix 128x64x32/64x32."""
        return f"paired {super().name}"


@dataclass(frozen=True)
class PreparedTile(PairedTile):
    """As those, of pairs that are made beforehand, in scratch memory."""

    body: ClassVar[str] = "prepared"
    weight_time: ClassVar[float] = 2.0  # half a byte to four read and four written, at 3 TB/s
    input_time: ClassVar[float] = 2.0

    @property
    def name(self) -> str:
        """Its sizes, as files and tables name it: prepared paired matrix 128x64x32/32x32."""
        return f"prepared {super().name}"


class Plan(NamedTuple):
    """How one product is computed: its tile, the number of stretches and their length."""

    tile: Tile
    splits: int
    length: int

    @property
    def name(self) -> str:
        """The tile and the number of stretches: 64x128x16/8x8 in 2."""
        return f"{self.tile.name} in {self.splits}"


# The first eight fit 16 KiB of workgroup memory and 256 lanes, WebGPU's defaults.
TILES = (
    Tile(32, 32, 32, 4, 4, 0.15, 0.31),
    Tile(32, 64, 32, 4, 4, 1.25, 0.57),
    Tile(64, 32, 32, 4, 4, 0.23, 0.55),
    Tile(64, 64, 16, 8, 4, 0.64, 0.48),
    Tile(64, 64, 16, 8, 4, 0.51, 0.46, buffers=2),
    Tile(64, 64, 32, 8, 4, 1.18, 0.91),
    Tile(64, 128, 16, 8, 8, 1.14, 0.88),
    Tile(128, 64, 16, 8, 8, 1.11, 0.83),
    Tile(128, 64, 16, 8, 8, 1.00, 0.85, buffers=2),
    Tile(128, 128, 16, 8, 8, 1.86, 1.68),
    Tile(128, 128, 16, 8, 8, 1.25, 1.65, buffers=2),
    Tile(128, 128, 32, 8, 8, 2.20, 3.36),
)

# With tiles of f16, half the memory.
HALF_TILES = (
    Tile(32, 64, 32, 4, 4, 1.02, 0.41, 2),
    Tile(64, 32, 32, 4, 4, 0.19, 0.37, 2),
    Tile(64, 64, 32, 4, 4, 0.55, 0.77, 2),
    Tile(64, 64, 16, 8, 4, 0.52, 0.40, 2, 2),
    Tile(64, 64, 32, 8, 4, 1.44, 0.70, 2),
    Tile(64, 64, 32, 8, 4, 0.47, 0.75, 2, 2),
    Tile(64, 128, 32, 8, 8, 1.87, 1.50, 2),
    Tile(128, 64, 32, 8, 8, 1.77, 1.45, 2),
    Tile(128, 64, 32, 8, 8, 0.87, 1.44, 2, 2),
    Tile(128, 128, 32, 8, 8, 2.01, 3.00, 2),
    Tile(128, 128, 32, 8, 8, 2.05, 2.76, 2, 2),
)

# On matrix units; constants of the model by a few products on an H100.
MATRIX_TILES = (
    MatrixTile(128, 128, 32, 64, 64, 1.10, 0.66),
    MatrixTile(256, 128, 32, 64, 64, 1.60, 1.30),
    MatrixTile(128, 128, 32, 64, 32, 0.90, 0.86),
    MatrixTile(128, 64, 32, 64, 32, 0.70, 0.43),
    MatrixTile(64, 128, 32, 64, 32, 0.70, 0.46),
    MatrixTile(64, 64, 64, 32, 32, 0.80, 0.52),
    MatrixTile(64, 64, 32, 32, 32, 0.50, 0.26),
    MatrixTile(32, 64, 32, 32, 32, 0.40, 0.16),
)

DECODED_TILES = (
    DecodedTile(128, 128, 32, 64, 64, 1.00, 0.50),
    DecodedTile(256, 128, 32, 64, 64, 1.50, 1.04),
)

# f32 on them; constants of the model by what an H200 took for 4096³ (42 TFLOP/s in F32).
PAIRED_TILES = (
    PairedTile(128, 128, 16, 64, 32, 1.80, 1.55),
    PairedTile(128, 64, 16, 64, 32, 1.10, 0.78),
    PairedTile(64, 128, 16, 64, 32, 1.10, 0.78),
    PairedTile(128, 64, 32, 32, 32, 1.70, 1.50),
    PairedTile(64, 64, 32, 32, 32, 1.10, 0.78),
    PairedTile(64, 64, 16, 32, 32, 0.65, 0.40),
    PairedTile(32, 64, 32, 32, 32, 0.80, 0.40),
)

# Pairs made beforehand; what an H200 took for 4096³ in F32. With weights of f16, of two products
# instead of three, 64x128x32/64x32 is the best (114 TFLOP/s).
PREPARED_TILES = (
    PreparedTile(128, 128, 32, 64, 32, 2.20, 1.56),
    PreparedTile(128, 128, 16, 64, 32, 1.30, 1.08),
    PreparedTile(64, 128, 32, 64, 32, 1.60, 1.01),
    PreparedTile(128, 64, 16, 64, 32, 0.80, 0.53),
    PreparedTile(64, 64, 32, 32, 32, 0.80, 0.50),
    PreparedTile(64, 64, 16, 32, 32, 0.55, 0.33),
)


def tiles_of(half: bool, workgroup_bytes: int | None = None) -> tuple[Tile, ...]:
    """The tiles of one precision: f16 where `half`.

    Args:
        workgroup_bytes: workgroup memory that the device has; None for all tiles.
    """
    tiles = HALF_TILES if half else TILES
    if workgroup_bytes is None:
        return tiles
    return tuple(tile for tile in tiles if tile.workgroup_bytes <= workgroup_bytes)


def known_tiles(half: bool) -> tuple[Tile, ...]:
    """All tiles of one precision, of any body."""
    on_units = (*MATRIX_TILES, *DECODED_TILES) if half else (*PAIRED_TILES, *PREPARED_TILES)
    return (*tiles_of(half), *on_units)


def matrix_tiles_of(workgroup_bytes: int) -> tuple[MatrixTile, ...]:
    """The tiles on matrix units that fit workgroup memory of so many bytes."""
    return tuple(tile for tile in MATRIX_TILES if tile.workgroup_bytes <= workgroup_bytes)


class PlanSpace(NamedTuple):
    """All plans that there are for one product on one device.

    Attributes:
        rows, columns: of the output.
        contraction: length of each sum.
        tiles: among which to choose.
        multiprocessors: of the device, between which workgroups are divided.
    """

    rows: int
    columns: int
    contraction: int
    tiles: tuple[Tile, ...]
    multiprocessors: int = MULTIPROCESSORS

    def microseconds(self, plan: Plan) -> float:
        """The model's time of the product under a plan."""
        tile, splits, length = plan
        workgroups = -(-self.rows // tile.tile_rows) * -(-self.columns // tile.tile_columns)
        load = -(-workgroups * splits // self.multiprocessors)
        time = _PRODUCT + tile.weight_time * self.columns * self.contraction / 1e6
        time += tile.input_time * self.rows * self.contraction / 1e6
        time += length / tile.depth * max(tile.latency, load * tile.work)
        if splits > 1:
            time += _REDUCE + _REDUCE_MILLION * self.rows * self.columns * splits / 1e6
        return time

    def splits(self, tile: Tile) -> list[int]:
        """The numbers of stretches worth a thought, ascending."""
        if not tile.may_cut(self.columns, self.contraction):
            return [1]
        fine: set[int] = set()
        if self.contraction >= _FINE_SPLITS[0] * _SHORTEST_FINE_SPLIT:
            fine = {*_FINE_SPLITS, *self._filling(tile)}
            fine = {n for n in fine if self.contraction // n >= _SHORTEST_FINE_SPLIT}
        plain = {n for n in _SPLITS if n == 1 or self.contraction // n >= _SHORTEST_SPLIT}
        outputs = self.rows * self.columns
        return sorted(n for n in plain | fine if n == 1 or n * outputs <= MOST_PARTIAL_SUMS)

    def _filling(self, tile: Tile) -> list[int]:
        """Those that leave as few multiprocessors idle as there can be in some rounds."""
        workgroups = -(-self.rows // tile.tile_rows) * -(-self.columns // tile.tile_columns)
        rounds = range(1, _MOST_ROUNDS + 1)
        filling = [n * self.multiprocessors // workgroups for n in rounds]
        return [n for n in filling if 1 < n < _FINE_SPLITS[-1]]


@cache
def ranked_plans(space: PlanSpace) -> tuple[Plan, ...]:
    """All plans for one product, the one that the model thinks fastest first."""
    plans: dict[Plan, float] = {}
    for tile in space.tiles:
        for wanted in space.splits(tile):
            plan = Plan(tile, *cut(space.contraction, wanted, tile.depth))
            plans[plan] = space.microseconds(plan)
    return tuple(sorted(plans, key=plans.__getitem__))


def choose_plan(space: PlanSpace) -> Plan:
    """The plan that the model thinks fastest."""
    return ranked_plans(space)[0]


def candidates(space: PlanSpace) -> list[Plan]:
    """The few plans that are worth timing, the model's choice first.

    At most two of one tile, since the model may be wrong about a tile on another device, the best
    of every body, and none that it thinks twice as slow as its choice.
    """
    slowest = 2 * space.microseconds(choose_plan(space))
    plans = [plan for plan in ranked_plans(space) if space.microseconds(plan) <= slowest]
    best = {plan.tile.body: plan for plan in reversed(plans)}
    chosen = [*best.values()]
    of_tile = Counter(plan.tile for plan in chosen)
    for plan in plans:
        if len(chosen) == MOST_CANDIDATES:
            break
        if of_tile[plan.tile] < 2 and plan not in best.values():
            of_tile[plan.tile] += 1
            chosen.append(plan)
    return sorted(chosen, key=plans.index)


def cut(contraction: int, splits: int, depth: int) -> tuple[int, int]:
    """Cuts a contraction into about `splits` stretches of whole steps.

    Returns:
        The number of stretches, and their length, a multiple of `depth`.
    """
    length = -(-contraction // (splits * depth)) * depth
    return -(-contraction // length), length
