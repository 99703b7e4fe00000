"""Attention, its gradient, and attention to the cache of keys and values."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from lora.backward.attention import Attended, attention_backward
from lora.checks.comparison import (
    Check,
    Comparison,
    NotHereError,
    compare,
    needs_half,
    same,
    spare_software,
    untouched,
    worst,
)
from lora.checks.references.attention import (
    Shape,
    attention_backward_reference,
    attention_reference,
    segments_of,
)
from lora.checks.references.attention_decode import attention_decode_reference, prepared_heads
from lora.checks.tensors import (
    activation,
    extent_in_use,
    marked,
    normal,
    rounded,
    typed,
)
from lora.forward.attention import attention
from lora.forward.attention_decode import (
    RowPlace,
    RowRope,
    attention_decode,
    attention_decode_row,
)
from lora.forward.attention_matrix import choose_cut
from lora.forward.attention_prompt import attention_prompt, head_halves, prompt_cut
from lora.forward.heads import Heads
from lora.forward.matmul_matrix import shape_on
from lora.forward.model.kv_cache import LayerCache, store_keys_values
from lora.forward.model.norm import HeadNorms, Norm
from lora.shaders.program import Program
from lora.shaders.recording import Recording

LENGTHS, SPARE = [33, 5, 3, 26], 3  # of examples that lie end to end; rows that are not in use
ROWS = sum(LENGTHS)
ROOM, EPSILON = 150, 1e-5  # keys in a cache; of the norm of heads


def check_attention(recording: Recording, shape: Shape, dtype: str, backward: bool) -> Comparison:
    """The bounds of tests/forward/test_attention.py: roundings of scores, and exp's error."""
    half = dtype == "f16"
    if half:
        needs_half(recording)
    if shape.head_size > 32:
        spare_software(recording)
    # The plain kernels, unless those on matrix units are asked for.
    recording = replace(recording, precision=dtype, body=recording.body or "tiled")
    segments = np.concatenate([segments_of(LENGTHS), np.tile([0, ROWS], (SPARE, 1))])
    qkv = rounded(normal(1, ROWS + SPARE, shape.width), dtype)
    query_size = shape.n_heads * shape.head_size
    d_out = rounded(normal(2, ROWS + SPARE, query_size), dtype)
    extent, program = extent_in_use(recording, ROWS + SPARE, ROWS), Program(recording)
    x, where = (
        typed(recording, qkv, dtype, extent),
        recording.memory.upload(segments.astype(np.uint32)),
    )
    heads = Heads(**shape.options)
    out, lse = attention(program, x, where, heads)
    if backward:
        d_y = typed(recording, d_out, dtype, extent)
        result = attention_backward(program, Attended(x, out, lse), d_y, where, heads)
    else:
        result = out
    width = result.shape[1]
    recording.memory.write(result, np.full((ROWS + SPARE, width), -7.0))
    program.run()
    found, used = recording.memory.read(result), slice(0, ROWS)
    steepness = max(1.0, shape.scale * np.sqrt(shape.head_size))
    if backward:
        expected = attention_backward_reference(qkv[used], d_out[used], segments[used], shape)
        atol = (8 * 2**-11 if half else 5e-6 * steepness) * float(np.abs(expected).max())
        return worst(compare(found[used], expected, atol=atol), untouched(found[ROWS:]))
    expected, scores = attention_reference(qkv[used], segments[used], shape)
    atol = (6 * 2**-11 if half else 5e-6) * steepness
    return worst(
        compare(found[used], expected, atol=atol),
        compare(recording.memory.read(lse)[used], scores, rtol=1e-6, atol=atol),
        untouched(found[ROWS:]),
    )


def check_matrix(recording: Recording, shape: Shape, *, backward: bool) -> Comparison:
    """The same on matrix units, whose sums are f32: the bounds of f16 hold with room to spare."""
    if shape_on(recording.facts) is None:
        raise NotHereError("no matrix units that multiply f16 and add f32")
    spare_software(recording)
    recording = replace(recording, body="matrix")
    if choose_cut("attention", recording, ROWS + SPARE, shape.n_heads, shape.head_size) is None:
        raise NotHereError(f"too little workgroup memory for heads of {shape.head_size}")
    return check_attention(recording, shape, "f16", backward)


def heads_of(columns: np.ndarray, head_size: int) -> np.ndarray:
    """[rows, heads, head_size] in float64."""
    return columns.astype(np.float64).reshape(len(columns), -1, head_size)


def as_keys_lie(keys: np.ndarray) -> np.ndarray:
    """Keys [room, kv_size] in the order of the cache, [kv_size / 4, room, 4]."""
    return np.ascontiguousarray(keys.reshape(len(keys), -1, 4).transpose(1, 0, 2))


def check_kv_store(recording: Recording) -> Comparison:
    """Keys and values of two rows of three go to their places, exactly."""
    qkv, where = normal(3, 3, 48), np.array([7, 140, 0], np.uint32)
    cache = LayerCache(recording.memory.empty((4, ROOM, 4)), recording.memory.empty((ROOM, 16)))
    extent, program = extent_in_use(recording, 3, 2), Program(recording)
    store_keys_values(
        program, activation(recording, qkv, extent), activation(recording, where, extent), cache,
        query_size=16,
    )  # fmt: skip
    program.run()
    keys, values = np.zeros((2, ROOM, 16), np.float32)
    keys[where[:2]], values[where[:2]] = qkv[:2, 16:32], qkv[:2, 32:]
    return worst(
        same(recording.memory.read(cache.keys), as_keys_lie(keys)),
        same(recording.memory.read(cache.values), values),
    )


def text_of(recording: Recording, heads: Heads) -> tuple[LayerCache, np.ndarray, np.ndarray]:
    """A cache that is filled with ROOM keys and values, and these [ROOM, kv_size]."""
    kv_size = heads.n_kv_heads * heads.head_size
    keys, values = normal(4, ROOM, kv_size), normal(5, ROOM, kv_size)
    uploaded = (recording.memory.upload(numbers) for numbers in (as_keys_lie(keys), values))
    return LayerCache(*uploaded), keys, values


def check_head_halves(recording: Recording, heads: Heads) -> Comparison:
    """Each head by the power of its largest number, to one of f16's neighbours."""
    rows, in_use, begin = 40, 37, 90
    cache, keys, values = text_of(recording, heads)
    sizes = 2.0 ** np.array([-30, 70, 3])[: heads.n_heads]
    q = normal(6, rows, heads.query_size).reshape(rows, heads.n_heads, -1) * sizes[:, None]
    qkv = np.concatenate([q.reshape(rows, -1), normal(7, rows, 2 * keys.shape[1])], axis=1)
    qkv[in_use:] = 1e30  # no head's largest
    extent, program = extent_in_use(recording, rows, in_use), Program(recording)
    halves = head_halves(
        program, activation(recording, qkv.astype(np.float32), extent),
        activation(recording, begin + np.arange(rows, dtype=np.uint32), extent), cache, heads,
    )  # fmt: skip
    program.run()
    found, n = (
        recording.memory.read(halves.eights).view(np.float16).astype(np.float64),
        begin + in_use,
    )
    powers = recording.memory.read(halves.sizes).view(np.float32)
    results = []
    queries = found[: halves.keys_at].reshape(rows, heads.n_heads, -1)[:in_use]
    cached = found[halves.keys_at :].reshape(ROOM, 2 * heads.n_kv_heads, -1)[:n]
    given = np.concatenate([keys, values], axis=1).reshape(ROOM, 2 * heads.n_kv_heads, -1)[:n]
    seen = 0 if heads.window is None else (begin + 1 - heads.window) // 64 * 64
    exact = [*q[:in_use].swapaxes(0, 1), *given[seen:].swapaxes(0, 1)]
    copies = [*queries.swapaxes(0, 1), *cached[seen:].swapaxes(0, 1)]
    for head, (numbers, copy) in enumerate(zip(exact, copies, strict=True)):
        largest = np.abs(numbers.astype(np.float32)).max()
        power = 2.0 ** (4 - np.floor(np.log2(np.float64(largest))))
        expected = numbers.astype(np.float32) * power
        results += [
            same(powers[head : head + 1], np.array([largest])),
            compare(copy, expected, rtol=2.0**-10, atol=2.0**-24),
        ]
    return worst(*results)


def check_prompt(recording: Recording, heads: Heads) -> Comparison:
    """A prompt's second piece on matrix units; the bound of `check_matrix`."""
    rows, in_use, begin = 80, 77, 70
    if shape_on(recording.facts) is None:
        raise NotHereError("no matrix units that multiply f16 and add f32")
    needs_half(recording)
    spare_software(recording)
    recording = replace(recording, precision="f32", products="f16", body="matrix")
    cut = prompt_cut(recording, rows, heads, ROOM)
    if cut is None:
        raise NotHereError(f"too little workgroup memory for heads of {heads.head_size}")
    cache, keys, values = text_of(recording, heads)
    qkv, extent = normal(6, rows, heads.qkv_size), extent_in_use(recording, rows, in_use)
    positions = begin + np.arange(rows, dtype=np.uint32)
    out, program = marked(recording, extent, heads.query_size), Program(recording)
    attention_prompt(
        program, activation(recording, qkv, extent), activation(recording, positions, extent),
        cache, heads, cut, out=out,
    )  # fmt: skip
    program.run()
    size = heads.head_size
    expected = attention_decode_reference(
        heads_of(qkv[:in_use, : heads.query_size], size), heads_of(keys, size),
        heads_of(values, size), positions[:in_use], heads.scale, heads.window, heads.softcap,
    ).reshape(in_use, -1)  # fmt: skip
    found = recording.memory.read(out)
    atol = 6 * 2**-11 * max(1.0, heads.scale * np.sqrt(size))
    return worst(compare(found[:in_use], expected, atol=atol), untouched(found[in_use:]))


def check_attention_decode(recording: Recording, heads: Heads) -> Comparison:
    """Rows at the edges of blocks; 1e-5 covers the roundings of scores of 256 columns."""
    cache, keys, values = text_of(recording, heads)
    positions = np.array([0, 63, 64, 127, 149, 9], np.uint32)
    qkv, extent = normal(6, 6, heads.qkv_size), extent_in_use(recording, 6, 5)
    out, program = marked(recording, extent, heads.query_size), Program(recording)
    attention_decode(
        program, activation(recording, qkv, extent), activation(recording, positions, extent),
        cache, heads, out=out,
    )  # fmt: skip
    program.run()
    size = heads.head_size
    expected = attention_decode_reference(
        heads_of(qkv[:, : heads.query_size], size), heads_of(keys, size), heads_of(values, size),
        positions, heads.scale, heads.window, heads.softcap,
    ).reshape(6, -1)  # fmt: skip
    result = recording.memory.read(out)
    return worst(compare(result[:5], expected[:5], atol=1e-5), untouched(result[5:]))


def check_attention_decode_row(recording: Recording, heads: Heads, interleaved: bool) -> Comparison:
    """One row, whose heads are normed and turned on their way into the cache."""
    size, position = heads.head_size, 130
    kv_size, half = heads.n_kv_heads * size, heads.head_size // 2
    keys, values = normal(7, ROOM, kv_size), normal(8, ROOM, kv_size)
    keys[position:], values[position:] = 1e4, 1e4  # left there by a longer text
    cache = LayerCache(recording.memory.upload(as_keys_lie(keys)), recording.memory.upload(values))
    qkv, angles = normal(9, 1, heads.qkv_size), normal(10, 9, half).astype(np.float64)
    weights = normal(11, size), normal(12, size)
    rope = RowRope(
        recording.memory.upload(np.stack([np.cos(angles), np.sin(angles)], axis=-1)), interleaved,
        HeadNorms(*(Norm(recording.memory.upload(weight), EPSILON) for weight in weights)),
    )  # fmt: skip
    place = RowPlace(recording.memory.upload(np.array([7, position, 5])), 1, 2)
    extent, program = extent_in_use(recording, 1, 1), Program(recording)
    out = marked(recording, extent, heads.query_size)
    attention_decode_row(
        program, activation(recording, qkv, extent), place, cache, heads, rope, out=out
    )
    program.run()
    exact = heads_of(qkv, size)[0]
    parts = exact[: heads.n_heads], exact[heads.n_heads : heads.n_heads + heads.n_kv_heads]
    q, k = (
        prepared_heads(part, weight, angles[5], interleaved, EPSILON)
        for part, weight in zip(parts, weights, strict=True)
    )
    all_keys, all_values = heads_of(keys, size), heads_of(values, size)
    all_keys[position], all_values[position] = k, exact[heads.n_heads + heads.n_kv_heads :]
    expected = attention_decode_reference(
        q[None], all_keys, all_values, np.array([position]), heads.scale, heads.window,
        heads.softcap,
    )  # fmt: skip
    stored = recording.memory.read(cache.keys).transpose(1, 0, 2).reshape(ROOM, kv_size)
    return worst(
        compare(recording.memory.read(out), expected.reshape(1, -1), atol=2e-5),
        compare(stored[position], k.reshape(-1), atol=1e-5),
        same(recording.memory.read(cache.values)[position], qkv[0, heads.query_size + kv_size :]),
        same(stored[:position], keys[:position]),
    )


SHAPES = (
    (Shape(3, 1, 20, 0.7, window=11), "f32", True),
    (Shape(4, 2, 32, 0.2), "f32", False),
    (Shape(4, 2, 32, 0.2), "f16", False),
    (Shape(4, 2, 64, 0.125, softcap=5.0, window=20), "f32", False),
    (Shape(4, 2, 64, 0.125), "f16", False),
    (Shape(2, 1, 128, 0.08), "f32", False),
    (Shape(2, 1, 128, 0.08), "f16", False),
    (Shape(2, 1, 256, 0.0625), "f32", False),
    (Shape(2, 1, 512, 0.05), "f32", False),
)
MATRIX_SHAPES = (
    Shape(4, 2, 64, 0.125, softcap=5.0, window=20),
    Shape(2, 2, 96, 0.1),
    Shape(2, 1, 128, 0.08),
    Shape(2, 1, 256, 0.0625),
)
PROMPT_HEADS = (
    Heads(4, 2, 64, 0.125),
    Heads(3, 1, 128, 0.09, window=50, softcap=5.0),
    Heads(2, 1, 256, 0.0625),
)
HEADS = (Heads(4, 2, 64, 0.125), Heads(3, 1, 100, 0.1, window=64, softcap=2.0))
LARGE_HEADS = Heads(2, 1, 320, 0.06)
CHECKS = [
    *(
        Check("attention" + "_backward" * backward,
              f"{ROWS}, {shape.n_heads}/{shape.n_kv_heads} heads of {shape.head_size} {dtype}",
              partial(check_attention, shape=shape, dtype=dtype, backward=backward), as_cpu)
        for backward in (False, True)
        for shape, dtype, as_cpu in SHAPES
    ),
    *(
        Check("attention_matrix" + "_backward" * backward,
              f"{ROWS}, {shape.n_heads}/{shape.n_kv_heads} heads of {shape.head_size}",
              partial(check_matrix, shape=shape, backward=backward))
        for backward in (False, True)
        for shape in MATRIX_SHAPES
    ),
    *(
        Check("attention_matrix_prompt", f"77, {heads.n_heads} heads of {heads.head_size}",
              partial(check_prompt, heads=heads))
        for heads in PROMPT_HEADS
    ),
    *(
        Check("head_halves", f"37, {heads.n_heads} heads of {heads.head_size}",
              partial(check_head_halves, heads=heads))
        for heads in (Heads(3, 1, 16, 1.0), Heads(2, 2, 64, 1.0, window=20))
    ),
    Check("kv_store", "2x48", check_kv_store),
    *(
        Check("attention_decode", f"5, {heads.n_heads} heads of {heads.head_size}",
              partial(check_attention_decode, heads=heads))
        for heads in (*HEADS, LARGE_HEADS)
    ),
    *(
        Check("attention_decode_row", f"1, {heads.n_heads} heads of {heads.head_size}",
              partial(check_attention_decode_row, heads=heads, interleaved=interleaved))
        for heads, interleaved in zip(HEADS, (False, True), strict=True)
    ),
]  # fmt: skip
