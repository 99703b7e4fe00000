"""Keys and values kept in a cache, and attention to them, against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest

from lora.checks.references.attention_decode import attention_decode_reference, prepared_heads
from lora.forward.attention_decode import (
    RowPlace,
    RowRope,
    attention_decode,
    attention_decode_row,
)
from lora.forward.heads import Heads
from lora.forward.int_row import IntRow
from lora.forward.model.kv_cache import LayerCache, store_keys_values
from lora.forward.model.norm import HeadNorms, Norm
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import MARKER, activation, extent_in_use, marked, run_twice
from tests.support.one_row import check_int_row

EPSILON = 1e-5  # of the norm of heads


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "head_size", "window", "softcap"),
    [
        (4, 2, 24, None, None),
        (3, 1, 64, None, 2.0),
        (2, 2, 256, 70, None),
        (8, 2, 4, 1, None),
        (2, 1, 100, 64, 1.5),
        (2, 1, 512, None, None),
        (1, 1, 320, 70, None),
    ],
)
def test_rows_against_a_filled_cache(
    recording: Recording,
    n_heads: int,
    n_kv_heads: int,
    head_size: int,
    window: int | None,
    softcap: float | None,
) -> None:
    """Positions at the edges of blocks; a cache that is not full; one row unused."""
    room, scale = 333, 0.3
    positions = np.array([0, 63, 64, 127, 128, 200, 332, 9], np.uint32)
    rows, in_use = len(positions), len(positions) - 1
    rng = np.random.default_rng(head_size)
    width = (n_heads + 2 * n_kv_heads) * head_size
    everything = rng.normal(size=(room, width)).astype(np.float32)
    q_size, kv_size = n_heads * head_size, n_kv_heads * head_size
    cache = LayerCache(
        recording.memory.empty((kv_size // 4, room, 4)), recording.memory.empty((room, kv_size))
    )

    # Stored in two runs, as a prompt in pieces.
    for start, stop in ((0, 250), (250, room)):
        extent = extent_in_use(recording, 300, stop - start)
        piece = np.full((300, width), np.nan, np.float32)  # rows not in use must not be stored
        piece[: stop - start] = everything[start:stop]
        where = np.zeros(300, np.uint32)
        where[: stop - start] = np.arange(start, stop)
        program = Program(recording)
        store_keys_values(
            program, activation(recording, piece, extent), activation(recording, where, extent),
            cache,
            query_size=q_size,
        )  # fmt: skip
        program.run()

    extent = extent_in_use(recording, rows, in_use)
    queries = np.full((rows, width), np.nan, np.float32)
    queries[:, :q_size] = rng.normal(size=(rows, q_size))
    out = marked(recording, extent, q_size)
    program = Program(recording)
    attention_decode(
        program, activation(recording, queries, extent), activation(recording, positions, extent),
        cache,
        Heads(n_heads, n_kv_heads, head_size, scale, window, softcap), out=out,
    )  # fmt: skip
    result = run_twice(program, out)

    def heads(columns: np.ndarray, n: int) -> np.ndarray:
        return columns.reshape(-1, n, head_size)

    expected = attention_decode_reference(
        heads(queries[:, :q_size], n_heads),
        heads(everything[:, q_size : q_size + kv_size], n_kv_heads),
        heads(everything[:, q_size + kv_size :], n_kv_heads),
        positions, scale, window, softcap,
    ).reshape(rows, q_size)  # fmt: skip
    # A score of up to 3 · sqrt(head_size) carries sqrt(head_size) roundings of 2^-24; its error
    # is that of its weight, of which the output is a mean of values around 1. 1e-5 covers 256.
    np.testing.assert_allclose(result[:in_use], expected[:in_use], rtol=0, atol=1e-5)
    assert (result[in_use:] == MARKER).all()


@pytest.mark.parametrize("position", [0, 63, 64, 200, 332])
@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "head_size", "half", "interleaved", "qk_norm", "window", "softcap"),
    [
        (4, 2, 24, 12, True, False, None, None),
        (3, 1, 64, 32, False, True, None, 2.0),
        (2, 2, 256, 128, False, False, 70, None),
        (8, 2, 4, 1, True, True, 1, None),
        (2, 1, 100, 25, False, True, 64, 1.5),
    ],
)
def test_one_row_on_its_way_into_the_cache(
    recording: Recording,
    position: int,
    n_heads: int,
    n_kv_heads: int,
    head_size: int,
    half: int,
    interleaved: bool,
    qk_norm: bool,
    window: int | None,
    softcap: float | None,
) -> None:
    """The row's k and v join those of rows before it; what lies after it is not seen."""
    room, scale, rope_row = 333, 0.3, 5
    rng = np.random.default_rng(head_size + position)
    q_size, kv_size = n_heads * head_size, n_kv_heads * head_size

    def numbers(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    keys, values = numbers(room, kv_size), numbers(room, kv_size)
    keys[position:], values[position:] = 1e4, 1e4  # left there by a longer text
    cache = LayerCache(
        recording.memory.empty((kv_size // 4, room, 4)), recording.memory.empty((room, kv_size))
    )
    as_stored = np.ascontiguousarray(keys.reshape(room, kv_size // 4, 4).transpose(1, 0, 2))
    qkv = numbers(1, q_size + 2 * kv_size)
    angles = rng.uniform(-3, 3, (9, half))
    tables = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    weights = [numbers(head_size) for _ in range(2)] if qk_norm else [None, None]
    place = RowPlace(recording.memory.upload(np.array([7, position, rope_row])), 1, 2)
    rope = RowRope(
        recording.memory.upload(tables), interleaved,
        None if weights[0] is None
        else HeadNorms(*(Norm(recording.memory.upload(w), EPSILON) for w in weights)),
    )  # fmt: skip
    extent = extent_in_use(recording, 1, 1)
    out = marked(recording, extent, q_size)
    program = Program(recording)
    heads = Heads(n_heads, n_kv_heads, head_size, scale, window, softcap)
    int_out = IntRow.allocate(recording, q_size, extent) if q_size % 32 == 0 else None
    attention_decode_row(
        program, activation(recording, qkv, extent), place, cache, heads, rope, out=out,
        int_out=int_out,
    )  # fmt: skip
    # Heads that are no whole blocks of numbers take one dispatch more.
    assert len(program.commands) == 2 + (int_out is not None and head_size % 32 != 0)
    results = []
    for _ in range(2):
        recording.memory.write(cache.keys, as_stored)
        recording.memory.write(cache.values, values)
        program.run()
        results.append(recording.memory.read(out))
    assert results[0].tobytes() == results[1].tobytes()

    exact = qkv[0].reshape(-1, head_size)
    q, k = (
        prepared_heads(part, weight, angles[rope_row], interleaved, EPSILON)
        for part, weight in zip(
            (exact[:n_heads], exact[n_heads : n_heads + n_kv_heads]), weights, strict=True
        )
    )
    all_keys = keys.astype(np.float64).reshape(room, n_kv_heads, head_size)
    all_values = values.astype(np.float64).reshape(room, n_kv_heads, head_size)
    all_keys[position], all_values[position] = k, exact[n_heads + n_kv_heads :]
    expected = attention_decode_reference(
        q[None], all_keys, all_values, np.array([position]), scale, window, softcap
    ).reshape(1, q_size)
    # As above; the norm and rope before it round q and k a few times more.
    np.testing.assert_allclose(results[0], expected, rtol=0, atol=2e-5)
    if int_out is not None:
        attended = results[0][0].astype(np.float64)
        check_int_row(recording.memory.read(int_out.words), attended, attended, error=2.0**-24)
    stored = recording.memory.read(cache.keys).transpose(1, 0, 2).reshape(room, kv_size)
    np.testing.assert_allclose(stored[position], k.reshape(-1), rtol=0, atol=1e-5)
    others = np.arange(room) != position
    assert (stored[others] == keys[others]).all()
    stored = recording.memory.read(cache.values)
    assert (stored[position] == qkv[0, q_size + kv_size :]).all()
    assert (stored[others] == values[others]).all()


def test_what_the_kernels_cannot_do_is_refused(recording: Recording) -> None:
    cache = LayerCache(recording.memory.empty((4, 8, 4)), recording.memory.empty((8, 16)))
    extent = extent_in_use(recording, 1, 1)
    qkv = activation(recording, np.zeros((1, 64), np.float32), extent)
    positions = activation(recording, np.zeros(1, np.uint32), extent)
    with pytest.raises(ValueError, match="cannot share"):
        Heads(4, 3, 8, 1.0)
    with pytest.raises(ValueError, match="expected a multiple of 4"):
        Heads(4, 2, 6, 1.0)
    with pytest.raises(ValueError, match="sees nothing"):
        Heads(4, 2, 8, 1.0, window=0)
    with pytest.raises(ValueError, match="qkv has shape"):
        attention_decode(Program(recording), qkv, positions, cache, Heads(6, 2, 8, 1.0))
    with pytest.raises(ValueError, match="keys has shape"):
        wrong = LayerCache(recording.memory.empty((4, 9, 4)), recording.memory.empty((8, 16)))
        attention_decode(Program(recording), qkv, positions, wrong, Heads(4, 2, 8, 1.0))
    place = RowPlace(positions, 0, 0)
    with pytest.raises(ValueError, match="turn more than 8"):
        attention_decode_row(
            Program(recording), qkv, place, cache, Heads(4, 2, 8, 1.0),
            RowRope(recording.memory.empty((3, 5, 2)), True),
        )  # fmt: skip
    with pytest.raises(ValueError, match="kv_store qkv has shape"):
        store_keys_values(Program(recording), qkv, positions, cache, query_size=16)
