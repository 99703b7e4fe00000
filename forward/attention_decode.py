"""Attention of new rows to the cached keys and values of all rows before them."""

from __future__ import annotations

from typing import Any

from forward.activations import activation, check_shape, extent_of
from forward.kv_cache import LayerCache
from shaders.program import Program
from shaders.tensor import Tensor

KEY_BLOCK = 64  # keys that a workgroup scores at once
_STRETCH = 128  # keys of a workgroup, where rows are so few that a head's keys are shared out
_WORKGROUPS_WANTED = 264  # two for each multiprocessor of a large GPU


def choose_stretch(is_cpu: bool, rows: int, n_heads: int, room: int) -> int:
    """How many keys one workgroup takes: all of them where rows and heads are many."""
    if is_cpu or rows * n_heads >= _WORKGROUPS_WANTED or room <= _STRETCH:
        return -(-room // KEY_BLOCK) * KEY_BLOCK
    return _STRETCH


def attention_decode(
    program: Program,
    qkv: Tensor,
    positions: Tensor,
    cache: LayerCache,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_size: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    stretch: int | None = None,
    out: Tensor | None = None,
) -> Tensor:  # [rows, n_heads · head_size]
    """Appends out = softmax(scale · q kᵀ) v, each row over the cache up to its own position.

    Args:
        qkv: [rows, (n_heads + 2 n_kv_heads) · head_size], of which q is read; the rows' own k and v
            are in the cache already.
        positions: u32 [rows], where in the cache each row's own key lies.
        cache: of the layer.
        n_heads: query heads.
        n_kv_heads: key and value heads; each serves n_heads / n_kv_heads query heads in a row.
        head_size: a multiple of 4, at most 256.
        scale: of the scores.
        window: a row sees this many keys, its own included; None for all.
        softcap: scores s become softcap · tanh(s / softcap); None for none.
        stretch: keys of one workgroup, a multiple of 64; by default chosen for the device.
        out: where to write; a new tensor by default.
    """
    extent = extent_of(qkv)
    room = cache.values.shape[0]
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(f"{n_heads} query heads cannot share {n_kv_heads} key heads evenly")
    if head_size % 4 or not 4 <= head_size <= 256:
        raise ValueError(f"head_size is {head_size}, expected a multiple of 4 up to 256")
    if window is not None and window < 1:
        raise ValueError(f"an attention window of {window} rows sees nothing, not even itself")
    check_shape("attention_decode qkv", qkv, None, (n_heads + 2 * n_kv_heads) * head_size)
    check_shape("attention_decode positions", positions, qkv.shape[0])
    check_shape("attention_decode values", cache.values, room, n_kv_heads * head_size)
    check_shape("attention_decode keys", cache.keys, n_kv_heads * head_size // 4, room, 4)
    y = out if out is not None else activation(program, extent, n_heads * head_size)
    check_shape("attention_decode output", y, qkv.shape[0], n_heads * head_size)
    keys = stretch or choose_stretch(program.device.is_cpu, extent.maximum, n_heads, room)
    if keys % KEY_BLOCK:
        raise ValueError(f"a stretch of {keys} keys is no multiple of {KEY_BLOCK}")
    splits = -(-room // keys)
    constants: dict[str, Any] = {
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_size": head_size,
        "stride": qkv.shape[1] // 4,
        "room": room,
        "scale": float(scale),
        "window": window,
        "softcap": None if softcap is None else float(softcap),
        "splits": splits,
        "stretch": keys,
    }
    n_heads_of_rows = extent.maximum * n_heads
    tensors = [extent.uniform, qkv, positions, cache.keys, cache.values]
    flops = 4 * head_size * n_heads_of_rows * min(room, window or room)
    if splits == 1:
        program.dispatch("attention_decode", constants, [*tensors, y], n_heads_of_rows, flops=flops)
        return y
    partial = program.device.scratch((n_heads_of_rows * splits, head_size))
    stats = program.device.scratch((n_heads_of_rows * splits, 2))
    program.dispatch(
        "attention_decode",
        constants,
        [*tensors, partial, stats],
        n_heads_of_rows * splits,
        flops=flops,
    )
    shared = ("n_heads", "head_size", "window", "splits", "stretch")
    program.dispatch(
        "attention_decode_combine",
        {key: constants[key] for key in shared},
        [extent.uniform, positions, partial, stats, y],
        -(-n_heads_of_rows * head_size // 256),
    )
    return y
