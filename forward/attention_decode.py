"""Attention of new rows to the cached keys and values of all rows before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora.forward.heads import Heads
from lora.forward.int_row import BLOCK, IntRow, to_int_row
from lora.forward.model.kv_cache import LayerCache
from lora.forward.model.norm import HeadNorms
from lora.shaders.activations import activation, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor

# Of the workgroups of one row: keys that each takes, and lanes. A GPU waits for memory, so that
# many workgroups load all that they need at once.
_ROW_KEYS = 64
_ROW_LANES = 256
MOST_FUSED_HEAD = 256  # numbers in a head of `attention_decode_row`: q, k and v have a lane each


def attention_decode(
    program: Program,
    qkv: Tensor,
    positions: Tensor,
    cache: LayerCache,
    heads: Heads,
    *,
    out: Tensor | None = None,
) -> Tensor:  # [rows, n_heads · head_size]
    """Appends out = softmax(scale · q kᵀ) v, each row over the cache up to its own position.

    Args:
        qkv: [rows, (n_heads + 2 n_kv_heads) · head_size], of which q is read; the rows' own k and v
            are in the cache already.
        positions: u32 [rows], where in the cache each row's own key lies.
        cache: of the layer.
        heads: of the layer.
        out: where to write; a new tensor by default.
    """
    extent, room = extent_of(qkv), heads.check_cache(cache)
    check_shape("attention_decode qkv", qkv, None, heads.qkv_size)
    check_shape("attention_decode positions", positions, qkv.shape[0])
    y = out if out is not None else activation(program, extent, heads.query_size)
    check_shape("attention_decode output", y, qkv.shape[0], heads.query_size)
    program.dispatch(
        "attention_decode",
        {**heads.constants(), "stride": qkv.shape[1] // 4, "room": room},
        [extent.uniform, qkv, positions, cache.keys, cache.values, y],
        extent.maximum * heads.n_heads,
        flops=4 * heads.query_size * extent.maximum * min(room, heads.window or room),
    )
    return y


@dataclass(frozen=True)
class RowRope:
    """How the heads of one row are made ready for attention.

    Attributes:
        tables: [n_positions, rope_dimensions / 2, 2] from `Rope.tables`.
        interleaved: pairs (2j, 2j + 1) instead of (j, j + rope_dimensions / 2).
        norms: of the heads before rope; None for none.
    """

    tables: Tensor
    interleaved: bool
    norms: HeadNorms | None = None


@dataclass(frozen=True)
class RowPlace:
    """Where one row is: numbers in a u32 tensor that the host writes for every token.

    Attributes:
        words: what holds them.
        position_at: the place of the row's position in the cache.
        rope_row_at: the place of its row in rope's tables.
    """

    words: Tensor
    position_at: int
    rope_row_at: int


def attention_decode_row(
    program: Program,
    qkv: Tensor,
    place: RowPlace,
    cache: LayerCache,
    heads: Heads,
    rope: RowRope,
    *,
    out: Tensor | None = None,
    int_out: IntRow | None = None,
) -> Tensor:  # [1, n_heads · head_size]
    """Appends what becomes of one row's q, k and v: norm of the heads, rope, cache, attention.

    Two dispatches for head_norm, rope, kv_store and attention_decode; k and v go into the cache.

    Args:
        qkv: [1, (n_heads + 2 n_kv_heads) · head_size], as the product gives it.
        place: where the row is.
        cache: of the layer; holds all rows before this one.
        heads: of the layer.
        rope: of the layer.
        out: where to write; a new tensor by default.
        int_out: where to write it as whole numbers, too, for the product that takes it.
    """
    extent, room = extent_of(qkv), heads.check_cache(cache)
    check_shape("attention_decode_row qkv", qkv, 1, heads.qkv_size)
    if heads.head_size > MOST_FUSED_HEAD:
        raise ValueError(f"attention_decode_row: heads of {heads.head_size} have too few lanes")
    check_shape("attention_decode_row rope tables", rope.tables, None, None, 2)
    if 2 * rope.tables.shape[1] > heads.head_size:
        raise ValueError(f"rope tables {rope.tables.shape} turn more than {heads.head_size}")
    y = out if out is not None else activation(program, extent, heads.query_size)
    check_shape("attention_decode_row output", y, 1, heads.query_size)
    tensors = [qkv, place.words, rope.tables, cache.keys, cache.values]
    splits, quads = -(-room // _ROW_KEYS), heads.head_size // 4
    partial = program.recording.memory.scratch((heads.n_heads, splits, quads + 1, 4))
    tensors.append(partial)
    if rope.norms is not None:
        check_shape("attention_decode_row q_weight", rope.norms.q.weight, heads.head_size)
        check_shape("attention_decode_row k_weight", rope.norms.k.weight, heads.head_size)
        tensors += [rope.norms.q.weight, rope.norms.k.weight]
    constants: dict[str, Any] = {
        **heads.constants(),
        "room": room,
        "half": rope.tables.shape[1],
        "interleaved": rope.interleaved,
        "qk_norm": rope.norms is not None,
        "epsilon": 0.0 if rope.norms is None else rope.norms.q.epsilon,
        "position_at": place.position_at,
        "rope_row_at": place.rope_row_at,
        "splits": splits,
        "keys": _ROW_KEYS,
        "lanes": _ROW_LANES,
        "teams": min(_ROW_LANES // quads, _ROW_KEYS),
    }
    program.dispatch(
        "attention_decode_row",
        constants,
        tensors,
        heads.n_heads * splits,
        flops=4 * heads.query_size * min(room, heads.window or room),
    )
    shared = ("n_heads", "head_size", "window", "splits", "keys", "position_at", "lanes", "teams")
    # Blocks of whole numbers lie within a head, or a dispatch of their own makes them.
    stores_ints = int_out is not None and heads.head_size % BLOCK == 0
    tensors = [place.words, partial, y]
    if stores_ints and int_out is not None:
        check_shape("attention_decode_row output", y, 1, int_out.width)
        tensors.append(int_out.words)
    program.dispatch(
        "attention_decode_combine",
        {**{key: constants[key] for key in shared}, "int_out": stores_ints},
        tensors,
        heads.n_heads,
    )
    if int_out is not None and not stores_ints:
        to_int_row(program, y, int_out)
    return y
