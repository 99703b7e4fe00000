"""Keys and values kept in a cache, and attention to them, against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest

from forward.attention_decode import attention_decode, choose_stretch
from forward.kv_cache import LayerCache, store_keys_values
from shaders.device import Device
from shaders.program import Program
from tests.kernels import MARKER, activation, extent_in_use, marked, run_twice


def reference(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    positions: np.ndarray,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> np.ndarray:
    """softmax(scale · q kᵀ) v in float64: q [rows, heads, d], keys, values [room, kv heads, d]."""
    rows, n_heads, head_size = q.shape
    shared = n_heads // keys.shape[1]
    out = np.zeros((rows, n_heads, head_size))
    for row, position in enumerate(positions):
        first = 0 if window is None else max(0, int(position) + 1 - window)
        for head in range(n_heads):
            k = keys[first : position + 1, head // shared].astype(np.float64)
            v = values[first : position + 1, head // shared].astype(np.float64)
            scores = k @ q[row, head] * scale
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ v / weights.sum()
    return out


@pytest.mark.parametrize("stretch", [None, 64, 128])
@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "head_size", "window", "softcap"),
    [
        (4, 2, 24, None, None),
        (3, 1, 64, None, 2.0),
        (2, 2, 256, 70, None),
        (8, 2, 4, 1, None),
        (2, 1, 100, 64, 1.5),
    ],
)
def test_rows_against_a_filled_cache(
    device: Device,
    stretch: int | None,
    n_heads: int,
    n_kv_heads: int,
    head_size: int,
    window: int | None,
    softcap: float | None,
) -> None:
    """Positions at the edges of blocks and stretches; a cache that is not full; one row unused."""
    room, scale = 333, 0.3
    positions = np.array([0, 63, 64, 127, 128, 200, 332, 9], np.uint32)
    rows, in_use = len(positions), len(positions) - 1
    rng = np.random.default_rng(head_size)
    width = (n_heads + 2 * n_kv_heads) * head_size
    everything = rng.normal(size=(room, width)).astype(np.float32)
    q_size, kv_size = n_heads * head_size, n_kv_heads * head_size
    cache = LayerCache(device.empty((kv_size // 4, room, 4)), device.empty((room, kv_size)))

    # Stored in two runs, as a prompt in pieces.
    for start, stop in ((0, 250), (250, room)):
        extent = extent_in_use(device, 300, stop - start)
        piece = np.full((300, width), np.nan, np.float32)  # rows not in use must not be stored
        piece[: stop - start] = everything[start:stop]
        where = np.zeros(300, np.uint32)
        where[: stop - start] = np.arange(start, stop)
        program = Program(device)
        store_keys_values(
            program, activation(device, piece, extent), activation(device, where, extent), cache,
            query_size=q_size,
        )  # fmt: skip
        program.run()

    extent = extent_in_use(device, rows, in_use)
    queries = np.full((rows, width), np.nan, np.float32)
    queries[:, :q_size] = rng.normal(size=(rows, q_size))
    out = marked(device, extent, q_size)
    program = Program(device)
    attention_decode(
        program, activation(device, queries, extent), activation(device, positions, extent), cache,
        n_heads=n_heads, n_kv_heads=n_kv_heads, head_size=head_size, scale=scale, window=window,
        softcap=softcap, stretch=stretch, out=out,
    )  # fmt: skip
    result = run_twice(program, out)

    def heads(columns: np.ndarray, n: int) -> np.ndarray:
        return columns.reshape(-1, n, head_size)

    expected = reference(
        heads(queries[:, :q_size], n_heads),
        heads(everything[:, q_size : q_size + kv_size], n_kv_heads),
        heads(everything[:, q_size + kv_size :], n_kv_heads),
        positions, scale, window, softcap,
    ).reshape(rows, q_size)  # fmt: skip
    # A score of up to 3 · sqrt(head_size) carries sqrt(head_size) roundings of 2^-24; its error
    # is that of its weight, of which the output is a mean of values around 1. 1e-5 covers 256.
    np.testing.assert_allclose(result[:in_use], expected[:in_use], rtol=0, atol=1e-5)
    assert (result[in_use:] == MARKER).all()


def test_stretches() -> None:
    """Few rows share out a head's keys, on a GPU; all is one stretch elsewhere."""
    assert choose_stretch(False, 1, 32, 4096) == 128
    assert choose_stretch(False, 512, 32, 4096) == 4096
    assert choose_stretch(True, 1, 32, 4096) == 4096
    assert choose_stretch(False, 1, 32, 100) == 128


def test_what_the_kernels_cannot_do_is_refused(device: Device) -> None:
    cache = LayerCache(device.empty((4, 8, 4)), device.empty((8, 16)))
    extent = extent_in_use(device, 1, 1)
    qkv = activation(device, np.zeros((1, 64), np.float32), extent)
    positions = activation(device, np.zeros(1, np.uint32), extent)
    sizes = {"n_heads": 4, "n_kv_heads": 2, "head_size": 8}

    def refused(match: str, **changes: int) -> None:
        with pytest.raises(ValueError, match=match):
            attention_decode(Program(device), qkv, positions, cache, scale=1.0, **sizes | changes)

    refused("cannot share", n_kv_heads=3)
    refused("multiple of 4 up to 256", head_size=6)
    refused("sees nothing", window=0)
    refused("no multiple of 64", stretch=32)
    refused("qkv has shape", head_size=16)
    with pytest.raises(ValueError, match="kv_store qkv has shape"):
        store_keys_values(Program(device), qkv, positions, cache, query_size=16)
