"""A prompt's attention to the cache on matrix units against float64; in plain WGSL without them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from lora.checks.references.attention_decode import attention_decode_reference
from lora.checks.tensors import MARKER, activation, extent_in_use, marked
from lora.forward.attention_matrix import MatrixCut, cuts_of
from lora.forward.attention_prompt import FEWEST_ROWS, attention_prompt, prompt_cut
from lora.forward.heads import Heads
from lora.forward.matmul_matrix import EMULATED, shape_on
from lora.forward.model.kv_cache import LayerCache, store_keys_values
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.attention_cuts import on_matrix_units
from tests.support.kernels import run_twice, with_facts

ROOM, SPARE = 333, 9


@dataclass(frozen=True)
class Text:
    """q, k and v of a text, whole numbers of f16 times a power of two for each head."""

    q: np.ndarray  # [rows, n_heads, head_size]
    k: np.ndarray  # [rows, n_kv_heads, head_size]
    v: np.ndarray

    @classmethod
    def random(cls, heads: Heads, rows: int, sizes: tuple[float, float, float]) -> Text:
        """Unit normals times sizes, of q, k, v; the next head's are half as large."""
        rng = np.random.default_rng(rows)

        def part(n: int, size: float) -> np.ndarray:
            halves = rng.normal(size=(rows, n, heads.head_size)).astype(np.float16)
            return halves.astype(np.float32) * (size * 0.5 ** np.arange(n))[None, :, None]

        n = heads.n_kv_heads
        parts = (part(heads.n_heads, sizes[0]), part(n, sizes[1]), part(n, sizes[2]))
        return cls(*(values.astype(np.float32) for values in parts))

    def rows(self, start: int, stop: int) -> np.ndarray:
        """[rows, qkv_size] as the product gives them."""
        parts = (part[start:stop].reshape(stop - start, -1) for part in (self.q, self.k, self.v))
        return np.concatenate(list(parts), axis=1)

    def attended(self, heads: Heads, start: int) -> np.ndarray:
        """What the rows from `start` on attend to, in float64."""
        positions = np.arange(start, len(self.q))
        return attention_decode_reference(
            self.q[start:], self.k, self.v, positions, heads.scale, heads.window, heads.softcap
        ).reshape(len(positions), -1)


def cut_of(recording: Recording, heads: Heads, block: int) -> MatrixCut:
    """The cut of the largest block up to that which fits."""
    shape = shape_on(recording.facts) or EMULATED
    for cut in cuts_of("attention", heads.head_size):
        if cut.block <= block and cut.fits("attention", heads.head_size, shape, recording.facts):
            return cut
    pytest.skip(f"no cut for heads of {heads.head_size} fits this device")


def attend(
    recording: Recording,
    heads: Heads,
    text: Text,
    pieces: list[int],
    cut: MatrixCut,
) -> np.ndarray:
    """The rows of the last piece, of a text that comes in pieces that end there."""
    kv_size, most = heads.n_kv_heads * heads.head_size, max(np.diff([0, *pieces])) + SPARE
    # What an earlier, longer text has left: no row sees it.
    cache = LayerCache(
        recording.memory.upload(np.full((kv_size // 4, ROOM, 4), np.nan, np.float32)),
        recording.memory.upload(np.full((ROOM, kv_size), np.nan, np.float32)),
    )
    for start, stop in zip([0, *pieces], pieces, strict=False):
        extent = extent_in_use(recording, int(most), stop - start)
        qkv = np.full((most, heads.qkv_size), np.nan, np.float32)
        qkv[: stop - start] = text.rows(start, stop)
        where = np.zeros(most, np.uint32)
        where[: stop - start] = np.arange(start, stop)
        x, positions = activation(recording, qkv, extent), activation(recording, where, extent)
        out, program = marked(recording, extent, heads.query_size), Program(recording)
        store_keys_values(program, x, positions, cache, query_size=heads.query_size)
        attention_prompt(program, x, positions, cache, heads, cut, out=out)
        found = run_twice(program, out)
        assert (found[stop - start :] == MARKER).all()  # not in use, untouched
    return found[: pieces[-1] - ([0, *pieces][-2])]


def for_prompts(recording: Recording, *, on_software: bool = False) -> Recording:
    """As a text in f32 has it, with products in f16."""
    halves = on_matrix_units(recording, on_software=on_software)
    return replace(halves, precision="f32", products="f16")


def check(
    recording: Recording, heads: Heads, text: Text, pieces: list[int], cut: MatrixCut
) -> None:
    """The last piece's rows against float64."""
    found = attend(recording, heads, text, pieces, cut)
    expected = text.attended(heads, [0, *pieces][-2])
    # As in test_attention_matrix.py: weights are f16, sums f32 that units truncate. Copies of whole
    # numbers of f16 are exact, whatever power of two they have.
    steepness = max(1.0, heads.scale * np.sqrt(heads.head_size) * np.abs(text.q).max() / 4
                    * np.abs(text.k).max() / 4)  # fmt: skip
    largest = np.abs(text.v).max(axis=(0, 2)).repeat(heads.n_heads // heads.n_kv_heads)
    miss = np.repeat((2**-11 + 2e-5 * steepness) * largest, heads.head_size)
    assert (np.abs(found - expected) <= 2**-11 * np.abs(expected) + miss).all()


PLAIN, WINDOWED = Heads(4, 2, 64, 0.125), Heads(3, 1, 64, 0.125, window=37)


@pytest.mark.parametrize(
    ("heads", "pieces", "block"),
    [
        (PLAIN, [50], 32),  # a text's beginning
        (PLAIN, [33, 103], 64),
        (WINDOWED, [45, 122, 139], 32),
        (WINDOWED, [ROOM], 64),
        (Heads(2, 2, 48, 0.2, softcap=5.0), [21, 101], 32),
        (Heads(2, 1, 128, 0.09, softcap=2.0, window=90), [200, 230], 64),
        (Heads(1, 1, 256, 0.0625), [7, 71], 64),
        (Heads(2, 1, 32, 0.3, window=1), [17], 16),
    ],
)
def test_against_float64(recording: Recording, heads: Heads, pieces: list[int], block: int) -> None:
    text = Text.random(heads, pieces[-1], (1, 1, 1))
    recording = for_prompts(recording)
    check(recording, heads, text, pieces, cut_of(recording, heads, block))


def test_on_any_driver(recording: Recording) -> None:
    """Also by software that has units, of 8 x 8 x 8 and by 8 lanes: a small kernel."""
    heads, recording = Heads(2, 1, 32, 0.2, window=30), for_prompts(recording, on_software=True)
    shape = shape_on(recording.facts)
    cut = MatrixCut(32, 32, *(16, 32, 16, 32) if shape is None else (shape.m, 32, shape.m, 32))
    text = Text.random(heads, 57, (1, 1, 1))
    check(recording, heads, text, [13, 57], cut)


@pytest.mark.parametrize(
    ("sizes", "scale"),
    [
        ((2.0**-40, 2.0**40, 2.0**60), 0.125),
        ((2.0**30, 2.0**-30, 2.0**-50), 0.125),
        ((2.0**125, 2.0**-113, 1.0), 2.0**-15),
    ],
    ids=["large", "small", "as far as f32 goes"],
)
def test_beyond_the_range_of_f16(
    recording: Recording, sizes: tuple[float, float, float], scale: float
) -> None:
    """Each head has a power of its own: no key and no value passes the range, or falls below it."""
    heads, recording = replace(PLAIN, scale=scale), for_prompts(recording)
    text = Text.random(heads, 103, sizes)
    check(recording, heads, text, [33, 103], cut_of(recording, heads, 64))


def test_scores_that_grow(recording: Recording) -> None:
    """Sums are scaled on the way, and again in later pieces."""
    text = Text.random(PLAIN, 103, (1, 1, 1))
    growing = text.k * np.float32(0.1) + (np.arange(103) // 32)[:, None, None]
    text = replace(text, q=np.ones_like(text.q), k=growing.astype(np.float16).astype(np.float32))
    recording = for_prompts(recording)
    check(recording, PLAIN, text, [40, 103], cut_of(recording, PLAIN, 64))


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_what_is_no_number_stays_none(recording: Recording, number: float) -> None:
    """And of others, which don't see it, no number is lost to its size."""
    text = Text.random(WINDOWED, 139, (1, 1, 1))
    text.v[20, 0, 5] = number
    recording = for_prompts(recording)
    found = attend(recording, WINDOWED, text, [45, 139], cut_of(recording, WINDOWED, 32))
    text.v[20, 0, 5] = 0.0
    expected = text.attended(WINDOWED, 45)
    of_it = [head * 64 + 5 for head in range(3)]
    assert not np.isfinite(found[: 20 + 37 - 45, of_it]).any()
    far = 20 + 37 + 64 - 45  # a step's and a block's keys before a row's window are multiplied, too
    np.testing.assert_allclose(found[far:], expected[far:], rtol=2**-11, atol=2**-9)
    others = np.setdiff1d(np.arange(192), of_it)
    np.testing.assert_allclose(found[:, others], expected[:, others], rtol=2**-11, atol=2**-9)


def test_where_it_is_taken(recording: Recording) -> None:
    on_units = replace(
        with_facts(
            recording, is_cpu=False, matrix_shapes=(EMULATED,), most_lanes=1024,
            workgroup_memory=49152, features=recording.facts.features | {"shader-f16"},
        ),
        products="f16",
    )  # fmt: skip
    cut = prompt_cut(on_units, 2048, PLAIN, 8192)
    assert cut is not None and cut.block == 64
    assert prompt_cut(on_units, FEWEST_ROWS, PLAIN, 8192) is not None
    for other, rows, heads in (
        (on_units, FEWEST_ROWS - 1, PLAIN),
        (on_units, 2048, Heads(4, 2, 72, 0.1)),  # no whole fragments
        (on_units, 2048, Heads(2, 1, 512, 0.1)),  # too large for workgroup memory
        (replace(on_units, products="f32"), 2048, PLAIN),
        (replace(on_units, products=None), 2048, PLAIN),
        (replace(on_units, body="tiled"), 2048, PLAIN),
        (with_facts(on_units, matrix_shapes=()), 2048, PLAIN),
        (with_facts(on_units, is_cpu=True), 2048, PLAIN),
        (with_facts(on_units, distrusted=frozenset({"attention"})), 2048, PLAIN),
        (with_facts(on_units, max_binding=1 << 20), 2048, PLAIN),
    ):
        assert prompt_cut(other, rows, heads, 8192) is None
