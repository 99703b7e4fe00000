"""Causal self-attention within examples, flash style: no scores are kept (Dao 2022, 2023)."""

from __future__ import annotations

from typing import Any

from forward.activations import activation, check_shape, extent_of
from shaders.device import Device
from shaders.program import Program
from shaders.tensor import Tensor

MAX_ACCUMULATORS = 64  # f32 a lane may hold as sums of output columns, before registers spill


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
    tile, workgroups = choose_tile(program, extent.maximum, n_heads, head_size, n_sums=1)
    program.dispatch(
        "attention",
        {**constants, **tile},
        [extent.uniform, qkv, segments, y, log_sums],
        workgroups,
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


def choose_tile(
    program: Program, rows: int, heads: int, head_size: int, *, n_sums: int
) -> tuple[dict[str, int], int]:
    """The tile of an attention kernel that owns blocks of rows of `heads` heads.

    Args:
        program: whose device it will run on.
        rows: recorded rows.
        heads: heads that have workgroups of their own.
        head_size: columns of a head.
        n_sums: how many sums of the size of its block a workgroup keeps (two for dk and dv).

    Returns:
        The template's tile constants and the number of workgroups. They decide speed only: the
        order of every sum is the same under all of them.
    """
    wanted = workgroups_wanted(program.device)
    per_lane = 4  # rows of the block a lane holds, of which there are 8 times as many
    while per_lane > 1 and (
        -(-head_size // 32) * 4 * per_lane * n_sums > MAX_ACCUMULATORS
        or -(-rows // (8 * per_lane)) * heads < wanted
    ):
        per_lane //= 2
    # Columns are held 16 vec4 at a time where that fits into 16 KiB beside the block and wastes
    # nothing: half as many barriers as with 8.
    wide = per_lane <= 2 and -(-head_size // 32) % 2 == 0
    tile = {"per_lane": per_lane, "chunk": 16 if wide else 8, "unroll": 4}
    return tile, -(-rows // (8 * per_lane)) * heads


def workgroups_wanted(device: Device) -> int:
    """Narrower blocks of rows are chosen until a dispatch has this many workgroups.

    Wide blocks load less for each product, but two workgroups for each multiprocessor of a large
    GPU are worth more.
    """
    return 1 if device.is_cpu else 256


def visible_pairs(rows: int, window: int | None) -> int:
    """How many (row, key) pairs one example of that many rows has."""
    if window is None or window >= rows:
        return rows * (rows + 1) // 2
    return rows * window - window * (window - 1) // 2
