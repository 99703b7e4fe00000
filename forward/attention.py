"""Causal self-attention within examples, flash style: no scores are kept (Dao 2022, 2023)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from forward.activations import activation, check_shape, extent_of
from shaders.device import Device
from shaders.program import Program
from shaders.tensor import Tensor

# Set these by benchmarks/attention.py.
TEAMS = {"attention": 2, "attention_backward_q": 2, "attention_backward_kv": 2}  # on a GPU
TEAM_LANES = {"attention": 64, "attention_backward_q": 64, "attention_backward_kv": 64}
MAX_ACCUMULATORS = 64  # f32 a lane may hold as sums of output columns, before registers spill
WORKGROUPS_WANTED = 128  # narrower blocks are chosen until a dispatch on a GPU has this many
UNROLL = 4

_SUMS = {"attention": 1, "attention_backward_q": 1, "attention_backward_kv": 2}
_OWN_TILES = {"attention": 1, "attention_backward_q": 2, "attention_backward_kv": 2}
_WEBGPU_WORKGROUP_MEMORY = 16_384  # bytes, by WebGPU's default limits


def attention(
    program: Program,
    qkv: Tensor,
    segments: Tensor,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_size: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
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
        n_heads: query heads.
        n_kv_heads: key and value heads; each serves n_heads / n_kv_heads query heads in a row.
        head_size: a multiple of 4, at most 256.
        scale: of the scores.
        window: a row sees this many rows, itself included; None for all.
        softcap: scores s become softcap · tanh(s / softcap); None for none.
        out: where to write; a new tensor by default.
        lse: where to write the log of each row's sum of exponentials, which the backward needs;
            a new tensor by default.
    """
    extent = extent_of(qkv)
    constants = attention_constants(
        qkv, segments, n_heads, n_kv_heads, head_size, scale, window, softcap
    )
    y = out if out is not None else activation(program, extent, n_heads * head_size)
    check_shape("attention output", y, qkv.shape[0], n_heads * head_size)
    log_sums = lse if lse is not None else activation(program, extent, n_heads)
    check_shape("attention log-sum-exp", log_sums, qkv.shape[0], n_heads)
    tile = choose_tile("attention", program.device, extent.maximum, n_heads, head_size)
    program.dispatch(
        "attention",
        {**constants, **asdict(tile)},
        [extent.uniform, qkv, segments, y, log_sums],
        tile.workgroups(extent.maximum, n_heads),
        flops=4 * head_size * n_heads * visible_pairs(extent.maximum, window),
    )
    return y, log_sums


def attention_constants(
    qkv: Tensor,
    segments: Tensor,
    n_heads: int,
    n_kv_heads: int,
    head_size: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> dict[str, Any]:
    """The template constants that forward and backward share, once shapes and options fit."""
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(f"{n_heads} query heads cannot share {n_kv_heads} key heads evenly")
    if head_size % 4 or not 4 <= head_size <= 256:
        raise ValueError(f"head_size is {head_size}, expected a multiple of 4 up to 256")
    if window is not None and window < 1:
        raise ValueError(f"an attention window of {window} rows sees nothing, not even itself")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}, expected a positive number, or None for no cap")
    columns = (n_heads + 2 * n_kv_heads) * head_size
    check_shape("attention qkv", qkv, None, columns)
    check_shape("attention segments", segments, qkv.shape[0], 2)
    if segments.dtype != "u32":
        raise ValueError(f"attention segments are {segments.dtype}, expected u32")
    return {
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_size": head_size,
        "stride": columns // 4,
        "scale": float(scale),
        "window": window,
        "softcap": None if softcap is None else float(softcap),
    }


@dataclass(frozen=True)
class Tile:
    """How an attention kernel cuts its work: the template constants of attention_tiles.wgsl.

    Only `teams` decides the order of sums; everything else decides speed alone.
    """

    teams: int = 1  # of lanes in a workgroup, each walking past its own share of keys (or queries)
    team_lanes: int = 64
    per_lane: int = 4  # rows of the workgroup's block that a lane holds
    chunk: int = 16  # vec4 columns of a head in the tile that is walked past: 8, 16 or 32
    held: bool = True  # the block's own tiles stay in workgroup memory
    prefetch: bool = True  # the next tile is read while this one is worked on
    unroll: int = 4  # columns in one turn of the loop of products

    @property
    def block(self) -> int:
        """Rows of the workgroup's block; at most 32, on which the kernels rely."""
        return self.team_lanes // 8 * self.per_lane

    def workgroups(self, rows: int, heads: int) -> int:
        """How many workgroups cover `heads` heads of that many rows."""
        return -(-rows // self.block) * heads

    def memory(self, kernel: str, head_size: int) -> int:
        """Bytes of workgroup memory that a kernel takes under this tile."""
        width = -(-head_size // (4 * self.chunk)) * self.chunk if self.held else self.chunk
        own = self.block * width * (_OWN_TILES[kernel] if self.held else 1)
        weights = self.block * 8
        maxima = self.block * 2 if kernel == "attention" else 0
        return 16 * (own + self.teams * (32 * self.chunk + weights + maxima))


def choose_tile(kernel: str, device: Device, rows: int, heads: int, head_size: int) -> Tile:
    """The tile of an attention kernel: as many rows a lane as registers, memory and rows allow.

    Args:
        kernel: one of the templates "attention", "attention_backward_q", "attention_backward_kv".
        device: what it will run on.
        rows: recorded rows.
        heads: heads that have workgroups of their own.
        head_size: columns of a head.
    """
    memory = workgroup_memory(device)
    # Columns are held 16 vec4 at a time where that wastes nothing: fewer barriers than with 8.
    chunks = (16, 8) if -(-head_size // 32) % 2 == 0 else (8,)

    # Workgroup memory of an adapter on the CPU is its cache, which larger held tiles overflow.
    may_hold = not device.is_cpu or head_size <= 64

    def fitting(teams: int, per_lane: int) -> Tile | None:
        for held in (True, False) if may_hold else (False,):
            for chunk in chunks:
                tile = Tile(
                    teams, TEAM_LANES[kernel], per_lane, chunk, held, not device.is_cpu, UNROLL
                )
                if tile.memory(kernel, head_size) <= memory:
                    return tile
        return None

    per_lane = 4
    while per_lane > 1 and (
        -(-head_size // 32) * 4 * per_lane * _SUMS[kernel] > MAX_ACCUMULATORS
        or TEAM_LANES[kernel] // 8 * per_lane > 32
    ):
        per_lane //= 2
    # Rows have no say in the number of teams: results would depend on them.
    teams = 1 if device.is_cpu else TEAMS[kernel]
    while teams > 1 and fitting(teams, per_lane) is None:
        teams //= 2
    wanted = 1 if device.is_cpu else WORKGROUPS_WANTED
    tile = fitting(teams, per_lane)
    while per_lane > 1 and (tile is None or tile.workgroups(rows, heads) < wanted):
        per_lane //= 2
        tile = fitting(teams, per_lane)
    if tile is None:
        raise ValueError(f"{kernel}: {memory} bytes of workgroup memory are too few")
    return tile


def workgroup_memory(device: Device) -> int:
    """Bytes of memory that the lanes of a workgroup can share."""
    if not device.holds_data:  # compiles nothing
        return _WEBGPU_WORKGROUP_MEMORY
    return int(device.wgpu.limits["max-compute-workgroup-storage-size"])


def visible_pairs(rows: int, window: int | None) -> int:
    """How many (row, key) pairs one example of that many rows has."""
    if window is None or window >= rows:
        return rows * (rows + 1) // 2
    return rows * window - window * (window - 1) // 2
