"""Attention of a prompt's rows to the cache of keys and values, on matrix units.

In place of `attention_decode`, where a prompt's products are in f16 and many rows come at once.
What is between products is f32, in the cache too: f16 are the copies that the units multiply. Each
head has a power of two of its own there, so that no finite number passes f16's range.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lora.forward.attention_matrix import MOST_GROWTH, MatrixCut, choose_cut, cut_constants
from lora.forward.heads import Heads
from lora.forward.matmul_matrix import takes_units
from lora.forward.model.kv_cache import LayerCache
from lora.shaders.activations import activation, check_f32, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

# In use from which on units are the faster. A block of rows walks past 2,048 keys in 64 steps of
# some 2 µs, however few of them are in use; `attention_decode` reads 2 MB for each row and head of
# 128, some 16 µs a row with 32 heads at 4 TB/s of an H200's cache.
FEWEST_ROWS = 16
_STRETCH = 64  # rows of a head that a workgroup makes f16: a multiple of every cut's walk


def attends_on_units(recording: Recording) -> bool:
    """Whether prompts may attend so: where their products are in f16 and take units."""
    return recording.half_products and takes_units(recording, "attention")


def prompt_cut(recording: Recording, rows: int, heads: Heads, room: int) -> MatrixCut | None:
    """How attention of up to so many rows to a cache is cut; None where units don't compute it.

    Args:
        rows: recorded ones.
        heads: of the layer.
        room: of the cache.
    """
    if not attends_on_units(recording) or rows < FEWEST_ROWS:
        return None
    if _eights(rows, heads, room)[1] * 16 > recording.facts.max_binding:
        return None
    return choose_cut("attention", recording, rows, heads.n_heads, heads.head_size)


def _eights(rows: int, heads: Heads, room: int) -> tuple[int, int]:
    """Of the copies in f16, eights of numbers: q's, and all."""
    queries = rows * heads.query_size // 8
    return queries, queries + room * (heads.qkv_size - heads.query_size) // 8


@dataclass(frozen=True)
class HeadHalves:
    """Copies in f16 of what rows attend with, each head multiplied by a power of two.

    Attributes:
        eights: u32 [·, 4]: q [rows, query_size], then keys beside values [room, 2 · kv_size].
        sizes: u32 [n_heads + 2 n_kv_heads], the bits of heads' largest numbers.
        keys_at: the row of `eights` at which keys begin.
    """

    eights: Tensor
    sizes: Tensor
    keys_at: int


def head_halves(
    program: Program, qkv: Tensor, positions: Tensor, cache: LayerCache, heads: Heads
) -> HeadHalves:
    """Appends the copies; they stay until something else asks for scratch memory.

    Args: as those of `attention_prompt`.
    """
    extent, room = extent_of(qkv), heads.check_cache(cache)
    memory, rows = program.recording.memory, extent.maximum
    keys_at, n_eights = _eights(rows, heads, room)
    n_heads = heads.n_heads + 2 * heads.n_kv_heads
    stretches = -(-max(rows, room) // _STRETCH)
    halves = HeadHalves(
        eights=replace(memory.scratch((n_eights, 4)), dtype="u32"),
        sizes=memory.row_scratch(n_heads),
        keys_at=keys_at,
    )
    largest = replace(memory.scratch((n_heads, stretches), beside=1), dtype="u32")
    constants: dict[str, Any] = {
        "n_heads": heads.n_heads,
        "n_kv_heads": heads.n_kv_heads,
        "head_size": heads.head_size,
        "window": heads.window,
        "stride": qkv.shape[1] // 4,
        "room": room,
        "stretch": _STRETCH,
        "stretches": stretches,
    }
    read = [extent.uniform, qkv, positions, cache.keys, cache.values, largest]
    program.dispatch("head_sizes", constants, read, n_heads * stretches)
    program.dispatch(
        "head_halves",
        {**constants, "keys_at": keys_at},
        [*read, halves.eights, halves.sizes],
        n_heads * stretches,
    )
    return halves


def attention_prompt(
    program: Program,
    qkv: Tensor,
    positions: Tensor,
    cache: LayerCache,
    heads: Heads,
    cut: MatrixCut,
    *,
    out: Tensor | None = None,
) -> Tensor:  # [rows, n_heads · head_size]
    """Appends out = softmax(scale · q kᵀ) v, each row over the cache up to its own position.

    Args:
        qkv: f32 [rows, (n_heads + 2 n_kv_heads) · head_size], of which q is read; the rows' own k
            and v are in the cache already.
        positions: u32 [rows], where in the cache each row's own key lies, one after another.
        cache: of the layer.
        heads: of the layer.
        cut: from `prompt_cut`.
        out: where to write; a new tensor by default.
    """
    extent, room = extent_of(qkv), heads.check_cache(cache)
    check_shape("attention_prompt qkv", qkv, None, heads.qkv_size)
    check_shape("attention_prompt positions", positions, qkv.shape[0])
    y = out if out is not None else activation(program, extent, heads.query_size)
    check_shape("attention_prompt output", y, qkv.shape[0], heads.query_size)
    check_f32("attention_prompt", qkv=qkv, output=y)
    halves, rows = head_halves(program, qkv, positions, cache, heads), extent.maximum
    program.dispatch(
        "attention_matrix",
        {
            **heads.constants(),
            **cut_constants(program.recording, cut, rows),
            "most_growth": MOST_GROWTH,
            "cached": True,
            "keys_at": halves.keys_at,
        },
        [extent.uniform, halves.eights, halves.sizes, positions, y],
        cut.workgroups(rows, heads.n_heads),
        flops=4 * heads.query_size * rows * min(room, heads.window or room),
    )
    return y
