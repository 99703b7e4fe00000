"""Attention against float64 numpy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lora.checks.references.attention import Shape, attention_reference, segments_of
from lora.forward.attention import GPU_TILES, Tile, attention, choose_tile
from lora.forward.heads import Heads
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.attention_cases import (
    CASES,
    HALF_CASES,
    ON_CPU,
    TILES,
    WINDOWED,
    normal,
    use_tile,
)
from tests.support.attention_runs import run_attention
from tests.support.half_tensors import needs_halves
from tests.support.kernels import with_facts


@pytest.mark.parametrize(("lengths", "shape", "tile"), CASES)
def test_attention(
    recording: Recording,
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    shape: Shape,
    tile: Tile,
) -> None:
    rows, spare = sum(lengths), 9
    use_tile(monkeypatch, tile)
    qkv, segments = normal(rows, rows, shape.width), segments_of(lengths)
    out, lse = run_attention(recording, qkv, segments, shape, spare)
    expected_out, expected_lse = attention_reference(qkv, segments, shape)
    # A score is a sum of head_size products of unit normals: its rounding walks about
    # sqrt(head_size) steps of 2^-25 of a partial sum of sqrt(head_size) · scale, 5e-7 at 256
    # columns, a few times that for the worst of 1e5. Vulkan lets exp miss by 3 + 2|x| units of
    # 2^-24, 1e-6 at x = -7. Values v are up to 4, and averaged.
    steepness = max(1.0, shape.scale * np.sqrt(shape.head_size))
    np.testing.assert_allclose(out[:rows], expected_out, rtol=0, atol=5e-6 * steepness)
    np.testing.assert_allclose(lse[:rows], expected_lse, rtol=1e-6, atol=5e-6 * steepness)
    assert (out[rows:] == -7.0).all()  # rows that are not in use stay untouched
    assert (lse[rows:] == -7.0).all()


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
    out, lse = run_attention(recording, qkv, segments, shape, spare)
    assert (out.dtype, lse.dtype) == (np.float16, np.float32)
    expected_out, expected_lse = attention_reference(qkv, segments, shape)
    # An output is rounded once. With f16 products a score's head_size sums, some 0.3 · steepness
    # each, are rounded by 2^-12 of themselves, which walks to 2^-11 of steepness, four times that
    # for the worst of 1e4; its error is that of its weight, and values are spread by 1.
    steepness = max(1.0, shape.scale * np.sqrt(shape.head_size))
    miss = 6 * 2**-11 * steepness if tile.half else 1e-5 * steepness
    np.testing.assert_allclose(out[:rows], expected_out, rtol=2**-11, atol=miss)
    np.testing.assert_allclose(lse[:rows], expected_lse, rtol=1e-6, atol=miss)
    assert (out[rows:] == -7.0).all()  # rows that are not in use stay untouched


@pytest.mark.parametrize("tile", [ON_CPU, TILES[3]])
def test_an_example_gives_the_same_bits_wherever_it_lies(
    recording: Recording, monkeypatch: pytest.MonkeyPatch, tile: Tile
) -> None:
    """And whenever it is computed."""
    use_tile(monkeypatch, tile)
    qkv, here = normal(1, 170, WINDOWED.width), slice(50, 150)
    segments = segments_of([45, 5, 100, 20])
    among, again = (run_attention(recording, qkv, segments, WINDOWED) for _ in range(2))
    alone = run_attention(recording, qkv[here], segments_of([100]), WINDOWED)
    for first, second, own in zip(among, again, alone, strict=True):
        assert first.tobytes() == second.tobytes()
        assert own.tobytes() == first[here].tobytes()


def test_tiles_of_as_many_teams_agree_bit_for_bit(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv, segments = normal(1, 170, WINDOWED.width), segments_of([45, 5, 100, 20])
    results = []
    for tile in TILES[3:6]:
        use_tile(monkeypatch, tile)
        results.append(run_attention(recording, qkv, segments, WINDOWED)[0].tobytes())
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("tile_type", ["f16", "f32"])
@pytest.mark.parametrize("memory", [16384, 32768, 49152])
@pytest.mark.parametrize("kernel", ["attention", "attention_backward_q", "attention_backward_kv"])
@pytest.mark.parametrize("is_cpu", [False, True])
def test_a_chosen_tile_fits_every_head(
    recording: Recording,
    kernel: str,
    memory: int,
    is_cpu: bool,
    tile_type: str,
) -> None:
    recording = with_facts(recording, is_cpu=is_cpu)
    recording = with_facts(recording, workgroup_memory=memory)
    for head_size in (*range(4, 257, 4), 320, 512):
        tiles = [
            choose_tile(kernel, recording, rows, 4, head_size, tile_type) for rows in (1, 512, 8192)
        ]
        for tile in tiles:
            assert tile.memory(kernel, head_size, tile_type) <= memory
            assert tile.cuts(head_size)
            assert tile.block <= 32
            assert tile.teams * tile.team_lanes <= 256
            assert tile_type == "f16" or not tile.half
        # What decides the order of sums is the same for all rows, or results would depend on them.
        assert len({replace(tile, per_lane=1, held=True) for tile in tiles}) == 1


@pytest.mark.parametrize(("kernel", "tile_type", "head_size"), GPU_TILES)
def test_a_row_of_the_table_is_taken_where_it_fits(
    recording: Recording, kernel: str, tile_type: str, head_size: int
) -> None:
    recording = with_facts(recording, is_cpu=False)
    recording = with_facts(recording, workgroup_memory=49152)  # NVIDIA's
    tile = choose_tile(kernel, recording, 1 << 20, 4, head_size, tile_type)
    assert tile == GPU_TILES[kernel, tile_type, head_size]


def test_large_scores_and_padding_rows_give_no_nan(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tile(monkeypatch, ON_CPU)
    qkv = 100.0 * normal(1, 70, WINDOWED.width)  # scores of some 1e5: the softmax is one-hot
    lengths = [45, *[1] * 25]  # padding rows are examples of one row
    out, lse = run_attention(recording, qkv, segments_of(lengths), WINDOWED)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()
    v = qkv.reshape(70, -1, 64)[45:, 4:].repeat(3, axis=1).reshape(25, -1)
    np.testing.assert_array_equal(out[45:], v)  # a row alone: p is exactly 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 8}, "8 query heads cannot share 3 key heads"),
        ({"head_size": 66}, "head_size is 66"),
        ({"head_size": 516}, "head_size is 516"),
        ({"head_size": 32}, "qkv has shape"),
        ({"window": 0}, "window of 0 rows"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"scale": 0.0}, "scale is 0.0"),
    ],
)
def test_what_cannot_be_computed_is_refused(
    recording: Recording, options: dict[str, Any], message: str
) -> None:
    shape = Shape(9, 3, 64, 0.125)
    extent = recording.memory.extent(4)
    qkv = recording.memory.empty((4, shape.width), extent=extent)
    segments = recording.memory.upload(segments_of([4]))
    with pytest.raises(ValueError, match=message):
        attention(Program(recording), qkv, segments, Heads(**{**shape.options, **options}))
