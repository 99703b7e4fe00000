"""Causal self-attention within examples, flash style: no scores are kept (Dao 2022, 2023)."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from math import log2
from typing import Any

from lora.forward.attention_matrix import MOST_GROWTH, choose_cut, cut_constants
from lora.forward.heads import Heads
from lora.shaders.activations import activation, check_f32, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

_SUMS = {"attention": 1, "attention_backward_q": 1, "attention_backward_kv": 2}
_OWN_TILES = {"attention": 1, "attention_backward_q": 2, "attention_backward_kv": 2}


def attention(
    program: Program,
    qkv: Tensor,
    segments: Tensor,
    heads: Heads,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # [rows, n_heads · head_size], [rows, n_heads]
    """Appends out = softmax(scale · q kᵀ) v, each row over its example up to itself.

    Examples lie end to end along the rows. Bit for bit, an example's result does not depend on
    where it lies or on what lies beside it.

    Args:
        program: what the dispatch is appended to.
        qkv: [rows, (n_heads + 2 n_kv_heads) · head_size]: the heads of q, of k, of v; RoPE applied.
        segments: u32 [rows, 2]: for each row the first row of its example and the row past its end.
        heads: how they lie, and how scores are made of them.
        out: where to write; a new tensor by default.
        lse: where to write the log of each row's sum of exponentials, which the backward needs;
            a new tensor by default; f32, where qkv and out may be f16.
    """
    extent = extent_of(qkv)
    constants = attention_constants(qkv, segments, heads)
    n_heads, head_size = heads.n_heads, heads.head_size
    y = out if out is not None else activation_like(program, qkv, heads.query_size)
    check_shape("attention output", y, qkv.shape[0], heads.query_size)
    log_sums = lse if lse is not None else activation(program, extent, n_heads)
    check_f32("attention", lse=log_sums)
    check_shape("attention log-sum-exp", log_sums, qkv.shape[0], n_heads)
    flops = 4 * head_size * n_heads * visible_pairs(extent.maximum, heads.window)
    halves = qkv.dtype == y.dtype == "f16"
    recording, rows = program.recording, extent.maximum
    cut = choose_cut("attention", recording, rows, n_heads, head_size) if halves else None
    if cut is not None:
        program.dispatch(
            "attention_matrix",
            {**matrix_constants(constants), **cut_constants(recording, cut, rows)}
            | {"most_growth": MOST_GROWTH},
            [extent.uniform, qkv, segments, y, log_sums],
            cut.workgroups(rows, n_heads),
            flops=flops,
        )
        return y, log_sums
    tile_type = qkv.dtype
    tile = choose_tile("attention", recording, rows, n_heads, head_size, tile_type)
    types = {"tile_type": tile_type, "qkv_type": qkv.dtype, "out_type": y.dtype}
    program.dispatch(
        "attention",
        {**constants, **types, **asdict(tile)},
        [extent.uniform, qkv, segments, y, log_sums],
        tile.workgroups(rows, n_heads),
        flops=flops,
    )
    return y, log_sums


def activation_like(program: Program, x: Tensor, columns: int) -> Tensor:
    """A new activation of x's type and rows."""
    extent = extent_of(x)
    return program.recording.memory.empty((extent.maximum, columns), x.dtype, extent=extent)


def attention_constants(qkv: Tensor, segments: Tensor, heads: Heads) -> dict[str, Any]:
    """The template constants that forward and backward share, once shapes fit."""
    heads.check_attended()
    check_shape("attention qkv", qkv, None, heads.qkv_size)
    check_shape("attention segments", segments, qkv.shape[0], 2)
    if segments.dtype != "u32":
        raise ValueError(f"attention segments are {segments.dtype}, expected u32")
    return {
        "n_heads": heads.n_heads,
        "n_kv_heads": heads.n_kv_heads,
        "head_size": heads.head_size,
        "stride": heads.qkv_size // 4,
        "scale": float(heads.scale),
        "half_scale": 2.0 ** round(log2(heads.scale)),  # exact in f16, unlike most scales
        "window": heads.window,
        "softcap": None if heads.softcap is None else float(heads.softcap),
    }


def matrix_constants(constants: dict[str, Any]) -> dict[str, Any]:
    """Of `attention_constants`, what the kernels on matrix units have in common."""
    found = {name: value for name, value in constants.items() if name != "half_scale"}
    return {**found, "cached": False}


@dataclass(frozen=True)
class Tile:
    """How an attention kernel cuts its work: the template constants of attention_tiles.wgsl.

    `teams`, `slices` and, with more than one slice or `half`, `chunk` decide the order of sums;
    everything else decides speed alone.
    """

    teams: int = 1  # of lanes in a workgroup, each walking past its own share of keys (or queries)
    team_lanes: int = 64
    per_lane: int = 4  # rows of the workgroup's block that a lane holds
    chunk: int = 16  # vec4 columns of a head in the tile that is walked past: 8 to 64
    held: bool = True  # the block's own tiles stay in workgroup memory
    prefetch: bool = True  # the next tile is read while this one is worked on
    unroll: int = 4  # columns in one turn of the loop of products
    slices: int = 1  # of a team's lanes, each with its own columns of every chunk, 8 at least
    half: bool = False  # products of f16 tiles, and sums of at most 32 of them, are f16

    @property
    def block(self) -> int:
        """Rows of the workgroup's block; at most 32, on which the kernels rely."""
        return self.team_lanes // (8 * self.slices) * self.per_lane

    def workgroups(self, rows: int, heads: int) -> int:
        """How many workgroups cover `heads` heads of that many rows."""
        return -(-rows // self.block) * heads

    def cuts(self, head_size: int) -> bool:
        """Whether heads of that size divide among its slices."""
        whole_heads = head_size % (4 * self.chunk) == 0
        return self.slices == 1 or (whole_heads and self.chunk % (8 * self.slices) == 0)

    def accumulators(self, kernel: str, head_size: int) -> int:
        """How many f32 a lane holds as sums of output columns."""
        groups = -(-head_size // (32 * self.slices))
        return groups * 4 * self.per_lane * _SUMS[kernel]

    def memory(self, kernel: str, head_size: int, tile_type: str = "f32") -> int:
        """Bytes of workgroup memory that a kernel takes under this tile."""
        width = -(-head_size // (4 * self.chunk)) * self.chunk if self.held else self.chunk
        own = self.block * width * (_OWN_TILES[kernel] if self.held else 1)
        weights = self.block * 8 * (16 * self.slices + 8 * self.half)
        maxima = self.block * 32 if kernel == "attention" else 0
        tiles = own + self.teams * 32 * self.chunk
        return tiles * (8 if tile_type == "f16" else 16) + self.teams * (weights + maxima)


_LARGE = Tile(team_lanes=128, per_lane=2, chunk=32, slices=4, held=False)
_LARGE_HALF = replace(_LARGE, half=True)

# On GPUs, by kernel, type of tiles and the largest head size that a row is for: set these by
# benchmarks/attention.py, which prints rows. `per_lane` is the largest.
GPU_TILES = {
    ("attention", "f32", 64): Tile(teams=2),
    ("attention", "f32", 128): Tile(teams=2),
    ("attention", "f32", 256): Tile(team_lanes=128, chunk=32, slices=4),
    ("attention", "f16", 64): Tile(teams=2, per_lane=2, half=True),
    ("attention", "f16", 128): Tile(teams=2, half=True),
    ("attention", "f16", 256): Tile(teams=2, team_lanes=128, chunk=32, slices=4, half=True),
    ("attention_backward_q", "f32", 64): Tile(teams=2),
    ("attention_backward_q", "f32", 128): Tile(teams=2, held=False),
    ("attention_backward_q", "f32", 256): Tile(team_lanes=128, per_lane=2, slices=2),
    ("attention_backward_q", "f16", 64): Tile(teams=2, half=True),
    ("attention_backward_q", "f16", 128): Tile(teams=2, half=True),
    ("attention_backward_q", "f16", 256): Tile(
        teams=2, team_lanes=128, chunk=32, slices=4, held=False, half=True
    ),
    ("attention_backward_kv", "f32", 64): Tile(teams=2),
    ("attention_backward_kv", "f32", 128): Tile(teams=2, per_lane=2),
    ("attention_backward_kv", "f32", 256): Tile(team_lanes=256, chunk=32, slices=4, held=False),
    ("attention_backward_kv", "f16", 64): Tile(teams=4, half=True),
    ("attention_backward_kv", "f16", 128): Tile(team_lanes=128, slices=2, half=True),
    ("attention_backward_kv", "f16", 256): Tile(
        teams=2, team_lanes=128, chunk=32, slices=4, held=False, half=True
    ),
    # Not measured yet: what fits 32 KiB and keeps as many sums a lane as those above.
    ("attention", "f32", 512): _LARGE,
    ("attention_backward_q", "f32", 512): _LARGE,
    ("attention_backward_kv", "f32", 512): _LARGE,
    ("attention", "f16", 512): _LARGE_HALF,
    ("attention_backward_q", "f16", 512): _LARGE_HALF,
    ("attention_backward_kv", "f16", 512): _LARGE_HALF,
}
WORKGROUPS_WANTED = 128  # narrower blocks are chosen until a dispatch on a GPU has this many

_MAX_ACCUMULATORS = 64  # of a lane, where no row fits: more would leave the registers


def choose_tile(
    kernel: str, recording: Recording, rows: int, heads: int, head_size: int, tile_type: str = "f32"
) -> Tile:
    """The tile of an attention kernel: its row of the table, or what fits the device.

    The number of rows decides `per_lane` alone: results would depend on anything else.

    Args:
        kernel: one of the templates "attention", "attention_backward_q", "attention_backward_kv".
        device: what it will run on.
        rows: recorded rows.
        heads: heads that have workgroups of their own.
        head_size: columns of a head.
        tile_type: "f32", or "f16" where all that is read into tiles is.
    """
    memory = recording.facts.workgroup_memory
    wanted = 1 if recording.facts.is_cpu else WORKGROUPS_WANTED
    tile = None if recording.facts.is_cpu else _table_tile(kernel, head_size, tile_type, memory)
    if tile is None:
        tile = _fitting_tile(kernel, recording.facts.is_cpu, head_size, tile_type, memory)
    while tile.per_lane > 1 and tile.workgroups(rows, heads) < wanted:
        tile = replace(tile, per_lane=tile.per_lane // 2)
    return tile


def _table_tile(kernel: str, head_size: int, tile_type: str, memory: int) -> Tile | None:
    """The row for a head, where the device has the memory for it and nothing is left over."""
    tile = GPU_TILES[kernel, tile_type, min(n for n in (64, 128, 256, 512) if head_size <= n)]
    fits = tile.memory(kernel, head_size, tile_type) <= memory
    return tile if fits and head_size % (4 * tile.chunk) == 0 else None


def _fitting_tile(kernel: str, is_cpu: bool, head_size: int, tile_type: str, memory: int) -> Tile:
    """A tile without slices: as many rows a lane as registers and memory allow."""
    # Columns are held 16 vec4 at a time where that wastes nothing: fewer barriers than with 8.
    chunks = (16, 8) if -(-head_size // 32) % 2 == 0 else (8,)
    # Workgroup memory of a CPU device is its cache, which larger held tiles overflow.
    may_hold = not is_cpu or head_size <= 64
    for teams, per_lane, held, chunk in itertools.product(
        (1,) if is_cpu else (2, 1), (4, 2, 1), (True, False) if may_hold else (False,), chunks
    ):
        tile = Tile(teams, 64, per_lane, chunk, held, prefetch=not is_cpu)
        few = per_lane == 1 or tile.accumulators(kernel, head_size) <= _MAX_ACCUMULATORS
        if few and tile.memory(kernel, head_size, tile_type) <= memory:
            return tile
    raise ValueError(f"{kernel}: {memory} bytes of workgroup memory are too few")


def visible_pairs(rows: int, window: int | None) -> int:
    """How many (row, key) pairs one example of that many rows has."""
    if window is None or window >= rows:
        return rows * (rows + 1) // 2
    return rows * window - window * (window - 1) // 2
