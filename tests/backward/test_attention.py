"""The gradient of attention against float64 numpy, and that against central differences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora.backward import attention as backward_attention
from lora.backward.attention import Attended, attention_backward
from lora.backward.rope import rope_backward
from lora.checks.references.attention import (
    Shape,
    attention_backward_reference,
    attention_reference,
    segments_of,
)
from lora.forward.attention import Tile, attention
from lora.forward.heads import Heads, Rotation
from lora.forward.model.rope_frequencies import Rope
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.attention_cases import (
    CASES,
    HALF_CASES,
    ON_CPU,
    TILES,
    UNSPLIT,
    WINDOWED,
    activation_of,
    normal,
    segments_on,
    use_tile,
)
from tests.support.attention_runs import run_backward
from tests.support.half_tensors import needs_halves
from tests.support.kernels import activation


def within(tile: Tile, head_size: int, recording: Recording) -> Tile:
    """The tile, or one of fewer rows where two tiles of them are too much for the device."""
    while tile.memory("attention_backward_kv", head_size) > recording.facts.workgroup_memory:
        tile = replace(tile, per_lane=tile.per_lane // 2)
    return tile


@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, 1, 4, 0.5),
        Shape(3, 3, 4, 0.9, window=2),
        Shape(4, 2, 4, 0.7, softcap=1.5, window=3),
    ],
)
def test_reference_against_central_differences(shape: Shape) -> None:
    segments = segments_of([5, 1, 3])
    qkv = normal(1, 9, shape.width).astype(np.float64)
    d_out = normal(2, 9, shape.n_heads * shape.head_size).astype(np.float64)
    d_qkv = attention_backward_reference(qkv, d_out, segments, shape)
    step = 1e-5
    for index in np.ndindex(qkv.shape):
        moved = [qkv.copy(), qkv.copy()]
        moved[0][index] += step
        moved[1][index] -= step
        above, below = ((d_out * attention_reference(x, segments, shape)[0]).sum() for x in moved)
        # The differences miss by step² times a third derivative of order 1, and by 2^-53 / step.
        assert abs((above - below) / (2 * step) - d_qkv[index]) < 1e-8


@pytest.mark.parametrize(("lengths", "shape", "tile"), CASES)
def test_attention_backward(
    recording: Recording,
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    shape: Shape,
    tile: Tile,
) -> None:
    rows, spare = sum(lengths), 9
    tile = within(tile, shape.head_size, recording)
    use_tile(monkeypatch, tile)
    monkeypatch.setattr(backward_attention, "choose_split", lambda *_: rows not in UNSPLIT)
    qkv, segments = normal(rows, rows, shape.width), segments_of(lengths)
    d_out = normal(rows + 1, rows, shape.n_heads * shape.head_size)
    d_qkv = run_backward(recording, qkv, d_out, segments, shape, spare)
    expected = attention_backward_reference(qkv, d_out, segments, shape)
    # As in the forward, p is off by some 1e-6 of itself, and so are d_p and dots, sums of head_size
    # products. A gradient is a sum of their products with q, k or d_out, whose errors are
    # independent: relative to the largest gradient it is off by no more than they are.
    steepness = max(1.0, shape.scale * np.sqrt(shape.head_size))
    np.testing.assert_allclose(
        d_qkv[:rows], expected, rtol=0, atol=5e-6 * steepness * np.abs(expected).max()
    )
    assert (d_qkv[rows:] == -7.0).all()  # rows that are not in use stay untouched


@pytest.mark.parametrize(("lengths", "shape", "tile"), HALF_CASES)
def test_f16_tensors(
    recording: Recording,
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    shape: Shape,
    tile: Tile,
) -> None:
    needs_halves(recording.facts)
    rows, spare = sum(lengths), 9
    use_tile(monkeypatch, tile)
    qkv, segments = normal(rows, rows, shape.width).astype(np.float16), segments_of(lengths)
    d_out = normal(rows + 1, rows, shape.n_heads * shape.head_size).astype(np.float16)
    d_qkv = run_backward(recording, qkv, d_out, segments, shape, spare)
    assert d_qkv.dtype == np.float16
    expected = attention_backward_reference(qkv, d_out, segments, shape)
    # A gradient is rounded once. The forward's output is f16, off by 2^-12 of itself, and the dots
    # with it by less than 2^-11 of the largest. With f16 products scores and d_p are off by some
    # 2^-11 and, the worst of 1e4, by four times that; weights and sums add a step each.
    largest = np.abs(expected).max()
    miss = 2**-11 * largest * (8 if tile.half else 1)
    np.testing.assert_allclose(d_qkv[:rows], expected, rtol=2**-11, atol=miss)
    assert (d_qkv[rows:] == -7.0).all()  # rows that are not in use stay untouched


@pytest.mark.parametrize("tile", [ON_CPU, TILES[3]])
def test_an_example_gives_the_same_bits_wherever_it_lies(
    recording: Recording, monkeypatch: pytest.MonkeyPatch, tile: Tile
) -> None:
    """And whenever it is computed."""
    use_tile(monkeypatch, within(tile, 64, recording))
    monkeypatch.setattr(backward_attention, "choose_split", lambda *_: True)
    qkv, d_out = normal(1, 170, WINDOWED.width), normal(2, 170, 3 * 64)
    segments = segments_of([45, 5, 100, 20])
    among, again = (run_backward(recording, qkv, d_out, segments, WINDOWED) for _ in range(2))
    assert among.tobytes() == again.tobytes()
    here = slice(50, 150)
    alone = run_backward(recording, qkv[here], d_out[here], segments_of([100]), WINDOWED)
    assert alone.tobytes() == among[here].tobytes()


def test_split_heads_and_tiles_of_as_many_teams_agree_bit_for_bit(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv, d_out = normal(1, 170, WINDOWED.width), normal(2, 170, 3 * 64)
    results = []
    for tile, split in ((TILES[3], True), (TILES[4], True), (TILES[4], False)):
        use_tile(monkeypatch, within(tile, 64, recording))
        monkeypatch.setattr(backward_attention, "choose_split", lambda *_, split=split: split)
        results.append(run_backward(recording, qkv, d_out, segments_of([45, 5, 120]), WINDOWED))
    for result in results:
        if recording.facts.is_cpu:
            assert result.tobytes() == results[0].tobytes()
        else:  # a GPU's compiler fuses products and sums differently from kernel to kernel
            np.testing.assert_allclose(result, results[0], atol=2e-6 * np.abs(result).max())


def test_large_scores_and_padding_rows_give_no_nan(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tile(monkeypatch, within(ON_CPU, 64, recording))
    monkeypatch.setattr(backward_attention, "choose_split", lambda *_: True)
    lengths = [45, *[1] * 25]  # padding rows are examples of one row
    qkv, d_out = 100.0 * normal(1, 70, WINDOWED.width), normal(2, 70, 3 * 64)
    d_qkv = run_backward(recording, qkv, d_out, segments_of(lengths), WINDOWED)
    assert np.isfinite(d_qkv).all()


def test_a_d_out_of_another_shape_is_refused(recording: Recording) -> None:
    shape = Shape(1, 1, 4, 0.5)
    extent = recording.memory.extent(4)
    qkv = recording.memory.empty((4, shape.width), extent=extent)
    segments = recording.memory.upload(segments_of([4]))
    program = Program(recording)
    heads = Heads(**shape.options)
    out, lse = attention(program, qkv, segments, heads)
    with pytest.raises(ValueError, match="d_out has shape"):
        attention_backward(program, Attended(qkv, out, lse), qkv, segments, heads)


@pytest.mark.parametrize(
    ("split", "dimensions", "last"),
    [
        (True, 8, ["reduce_rope_backward"]),
        (True, 4, ["attention_backward_kv_sum", "rope_backward"]),
        (False, 8, ["attention_backward_kv", "rope_backward"]),
    ],
)
def test_gradients_are_turned_back(
    recording: Recording, monkeypatch: pytest.MonkeyPatch, split: bool, dimensions: int,
    last: list[str],
) -> None:  # fmt: skip
    """As by rope's gradient after it, bit for bit; heads that turn whole take their sums along."""
    use_tile(monkeypatch, TILES[1])
    monkeypatch.setattr(backward_attention, "choose_split", lambda *_: split)
    shape, heads, rows = Shape(4, 2, 8, 0.5), Heads(4, 2, 8, scale=0.5), 9
    extent = recording.memory.extent(rows)
    qkv, d_out = normal(1, rows, shape.width), normal(2, rows, 32)
    x, d_y = (activation_of(recording, extent, values) for values in (qkv, d_out))
    segments = segments_on(recording, extent, segments_of([5, 1, 3]))
    tables = recording.memory.upload(Rope(1e4, dimensions, interleaved=False).tables(16))
    positions = activation(recording, np.arange(rows, dtype=np.uint32), extent)
    rotation, program = Rotation(positions, tables, interleaved=False), Program(recording)
    attended = Attended(x, *attention(program, x, segments, heads))
    apart = attention_backward(program, attended, d_y, segments, heads)
    rope_backward(program, apart, rotation, 6, 8)
    at_once = attention_backward(program, attended, d_y, segments, heads, rotation=rotation)
    program.run()
    found, expected = recording.memory.read(at_once), recording.memory.read(apart)
    assert found.tobytes() == expected.tobytes() and found.any()
    assert [d.label for d in program.dispatches][-len(last) :] == last
