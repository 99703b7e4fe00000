"""Attention on matrix units and its gradient against float64; in plain WGSL without such units."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora.backward import attention as backward_attention
from lora.checks.references.attention import (
    Shape,
    attention_backward_reference,
    attention_reference,
    segments_of,
)
from lora.forward.attention_matrix import CUTS, MOST_HEAD_SIZE, choose_cut, cuts_of
from lora.forward.matmul_matrix import EMULATED
from lora.shaders.recording import Recording
from lora.shaders.webgpu import MatrixShape
from tests.support.attention_cases import WINDOWED, normal
from tests.support.attention_cuts import on_matrix_units, use_block
from tests.support.attention_runs import run_attention, run_backward
from tests.support.kernels import with_facts

KERNELS = ("attention", "attention_backward_q", "attention_backward_kv")
SPARE = 9

# Lengths of the examples that lie end to end, the shape, and the largest block.
CASES = [
    ([33, 5, 92], WINDOWED, 128),
    ([1, 63, 1], WINDOWED, 16),
    ([70, 10, 50], WINDOWED, 64),
    ([65, 64], Shape(2, 2, 48, 0.2, softcap=5.0), 32),
    ([40, 25, 3], Shape(2, 1, 128, 0.09, softcap=2.0, window=20), 64),
    ([21, 70], Shape(1, 1, 256, 0.0625), 64),
    ([17], Shape(2, 1, 32, 0.3, window=1), 16),
]


def halves(seed: int, *shape: int) -> np.ndarray:
    return normal(seed, *shape).astype(np.float16)


def check(recording: Recording, lengths: list[int], shape: Shape, size: float = 1.0) -> None:
    """Forward and backward; qkv is `size` times unit normals."""
    rows = sum(lengths)
    qkv = (size * normal(rows, rows, shape.width)).astype(np.float16)
    d_out, segments = halves(rows + 1, rows, shape.n_heads * shape.head_size), segments_of(lengths)
    out, lse = run_attention(recording, qkv, segments, shape, SPARE)
    expected_out, expected_lse = attention_reference(qkv, segments, shape)
    # Products of f16 are exact, and sums f32, on units truncated: a score's head_size terms walk to
    # some 2^-21 of their size. A weight is f16, off by 2^-12 of itself, and so is the output.
    steepness = max(1.0, size**2 * shape.scale * np.sqrt(shape.head_size))
    miss = 2**-11 * size + 2e-5 * size * steepness
    np.testing.assert_allclose(out[:rows], expected_out, rtol=2**-11, atol=miss)
    np.testing.assert_allclose(lse[:rows], expected_lse, rtol=1e-6, atol=2**-11 * steepness)
    assert (out[rows:] == -7.0).all() and (lse[rows:] == -7.0).all()  # not in use, untouched
    d_qkv = run_backward(recording, qkv, d_out, segments, shape, SPARE)
    expected = attention_backward_reference(qkv, d_out, segments, shape)
    # As with plain kernels of f16 tensors: weights and gradients of scores are f16, and what is
    # stored; the dots are with an output that was.
    largest = np.abs(expected).max()
    np.testing.assert_allclose(d_qkv[:rows], expected, rtol=2**-11, atol=2**-10 * largest)
    assert (d_qkv[rows:] == -7.0).all()


@pytest.mark.parametrize(("lengths", "shape", "block"), CASES)
def test_against_float64(
    recording: Recording,
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    shape: Shape,
    block: int,
) -> None:
    use_block(monkeypatch, block)
    check(on_matrix_units(recording), lengths, shape)


def test_on_any_driver(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by software that has units: the smallest kernel."""
    use_block(monkeypatch, 16)
    check(on_matrix_units(recording, on_software=True), [13, 20], Shape(1, 1, 32, 0.2))


def test_sums_are_scaled_when_scores_grow(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that grow from step to step move the maximum far more than weights may pass it by."""
    use_block(monkeypatch, 32)
    shape, rows = Shape(1, 1, 64, 0.125), 130
    qkv = halves(1, rows, shape.width)
    qkv[:, :64] = 1.0
    qkv[:, 64:128] = (0.1 * qkv[:, 64:128] + (np.arange(rows) // 32)[:, None]).astype(np.float16)
    segments = segments_of([rows])
    out, lse = run_attention(on_matrix_units(recording), qkv, segments, shape)
    expected, sums = attention_reference(qkv, segments, shape)
    assert np.ptp(sums) > 20  # by e^8 from one step to the next
    np.testing.assert_allclose(out, expected, rtol=2**-11, atol=2**-10)
    np.testing.assert_allclose(lse, sums, rtol=1e-6, atol=2**-10)


def test_an_example_gives_the_same_bits_wherever_it_lies_and_whatever_the_block(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whenever it is computed. Scores are large enough that sums are scaled on the way."""
    recording = on_matrix_units(recording)
    monkeypatch.setattr(backward_attention, "choose_split", lambda *_: True)
    qkv, d_out = (3 * normal(1, 170, WINDOWED.width)).astype(np.float16), halves(2, 170, 192)
    here, found = slice(50, 150), []
    for block, twice in ((128, True), (16, False)):
        use_block(monkeypatch, block)
        for _ in range(1 + twice):
            segments = segments_of([45, 5, 100, 20])
            among = run_attention(recording, qkv, segments, WINDOWED)
            d_among = run_backward(recording, qkv, d_out, segments, WINDOWED)
            found.append([x[here].tobytes() for x in (*among, d_among)])
        alone = run_attention(recording, qkv[here], segments_of([100]), WINDOWED)
        d_alone = run_backward(recording, qkv[here], d_out[here], segments_of([100]), WINDOWED)
        found.append([x.tobytes() for x in (*alone, d_alone)])
    assert all(other == found[0] for other in found)


def test_large_scores_give_no_nan(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    use_block(monkeypatch, 16)
    recording = on_matrix_units(recording)
    monkeypatch.setattr(backward_attention, "choose_split", lambda *_: True)
    lengths = [45, *[1] * 25]  # padding rows are examples of one row
    qkv, d_out = (60 * normal(1, 70, WINDOWED.width)).astype(np.float16), halves(2, 70, 192)
    out, lse = run_attention(recording, qkv, segments_of(lengths), WINDOWED)
    assert np.isfinite(out).all() and np.isfinite(lse).all()
    assert np.isfinite(run_backward(recording, qkv, d_out, segments_of(lengths), WINDOWED)).all()


SHAPES = [EMULATED, MatrixShape(8, 8, 8, "f16", "f32", 32, 32)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_chosen_cut_fits_every_head(
    recording: Recording, kernel: str, shape: MatrixShape
) -> None:
    recording = with_facts(
        recording, is_cpu=False, matrix_shapes=(shape,), most_lanes=1024, workgroup_memory=49152
    )
    for head_size in (*range(16, MOST_HEAD_SIZE + 1, 16),):
        chosen = [choose_cut(kernel, recording, rows, 4, head_size) for rows in (16, 512, 8192)]
        assert None not in chosen or head_size > 192 and head_size != 256
        for cut in chosen:
            assert cut is None or cut.fits(kernel, head_size, shape, recording.facts)
        # The order of sums is the same for all rows, or results would depend on them.
        assert len({cut and cut.walk for cut in chosen}) == 1
    assert choose_cut(kernel, recording, 15, 4, 64) is None  # fewer rows than a fragment has
    assert choose_cut(kernel, recording, 512, 4, 72) is None  # no whole fragments
    assert choose_cut(kernel, recording, 512, 4, 512) is None  # too large for workgroup memory
    plain = replace(recording, body="tiled")
    assert choose_cut(kernel, plain, 512, 4, 64) is None
    without = with_facts(recording, matrix_shapes=())
    assert choose_cut(kernel, without, 512, 4, 64) is None


@pytest.mark.parametrize(("kernel", "head_size"), CUTS)
def test_every_row_of_the_table_can_be_reached(
    recording: Recording, kernel: str, head_size: int
) -> None:
    recording = with_facts(
        recording, is_cpu=False, matrix_shapes=(EMULATED,), most_lanes=1024, workgroup_memory=49152
    )
    chosen = {choose_cut(kernel, recording, rows, 1, head_size) for rows in range(16, 33000, 16)}
    assert chosen == set(cuts_of(kernel, head_size))
