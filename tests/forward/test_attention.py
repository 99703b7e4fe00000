"""Attention against float64 numpy."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pytest

import forward.attention
from forward.attention import GPU_TILES, Tile, attention, choose_tile
from shaders.device import Device
from shaders.program import Program
from shaders.tensor import Extent, Tensor


@dataclass(frozen=True)
class Shape:
    """The options of one attention, by the names of its keywords."""

    n_heads: int
    n_kv_heads: int
    head_size: int
    scale: float
    window: int | None = None
    softcap: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def width(self) -> int:
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_size


ON_CPU = Tile(prefetch=False)  # what software adapters take, apart from its size
ON_GPU = Tile(teams=2, per_lane=2)  # two teams, and within the 32 KiB of this device
TILES = [
    ON_CPU,
    replace(ON_CPU, per_lane=2, chunk=8, held=False),
    Tile(per_lane=1, chunk=32),
    replace(ON_GPU, chunk=8, per_lane=4),
    replace(ON_GPU, chunk=8, held=False, unroll=8),
    Tile(teams=2, team_lanes=128, per_lane=1, chunk=8, held=False),
    Tile(teams=4, per_lane=1, chunk=8, prefetch=False),
    Tile(team_lanes=256, per_lane=1, chunk=16, unroll=16, held=False),
    Tile(teams=2, slices=2, per_lane=2),
    Tile(team_lanes=128, slices=4, chunk=32, per_lane=2, held=False),
    Tile(team_lanes=256, slices=4, chunk=32, held=False, per_lane=1),
]

# Lengths of the examples that lie end to end, the shape, and the tile.
CASES = [
    ([1], Shape(1, 1, 4, 0.5), TILES[0]),
    ([1], Shape(1, 1, 4, 0.5), TILES[3]),
    ([7], Shape(3, 1, 20, 0.7, window=3), TILES[1]),
    ([1, 63, 1], Shape(2, 2, 64, 0.125), TILES[4]),
    ([33, 5, 92], Shape(3, 1, 64, 0.2, softcap=2.0), TILES[3]),
    ([33, 5, 3, 20, 69], Shape(3, 1, 64, 0.2), TILES[5]),
    ([33, 5, 92], Shape(3, 1, 64, 0.2, window=3), TILES[6]),
    ([65, 65], Shape(9, 3, 64, 0.125, window=37), TILES[0]),
    ([70, 60], Shape(2, 2, 48, 0.1, window=1), TILES[4]),
    ([130], Shape(4, 2, 80, 0.1, window=64), TILES[6]),
    ([200, 150], Shape(2, 1, 32, 0.2, window=100), TILES[3]),
    ([130], Shape(4, 2, 96, 0.1), TILES[2]),
    ([40, 25], Shape(4, 1, 128, 0.08, softcap=5.0, window=20), TILES[7]),
    ([64, 66], Shape(4, 1, 256, 0.0625), replace(ON_CPU, per_lane=1, held=False)),
    ([33, 5, 3, 20, 69], Shape(3, 1, 64, 0.2, softcap=2.0), TILES[8]),
    ([40, 25], Shape(4, 2, 128, 0.08, window=20), TILES[9]),
    ([3, 90], Shape(2, 1, 256, 0.0625), TILES[10]),
]

# The same with f16 tensors.
HALF_CASES = [
    ([33, 5, 92], Shape(3, 1, 20, 0.2, window=37), ON_CPU),
    ([33, 5, 3, 20, 69], Shape(3, 1, 64, 0.125), Tile(teams=2, half=True)),
    ([65, 64], Shape(2, 2, 96, 0.1, softcap=5.0), Tile(chunk=8, held=False, half=True)),
    ([40, 26], Shape(2, 1, 256, 0.0625), replace(TILES[10], half=True)),
]


def segments_of(lengths: list[int]) -> np.ndarray:
    """[rows, 2]: for each row the first row of its example and the row past its end."""
    ends = np.cumsum(lengths)
    return np.concatenate(
        [np.tile([end - n, end], (n, 1)) for n, end in zip(lengths, ends, strict=True)]
    ).astype(np.uint32)


def split_heads(qkv: np.ndarray, shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [n_heads, rows, head_size], k and v [n_kv_heads, rows, head_size]."""
    heads = qkv.reshape(len(qkv), -1, shape.head_size).swapaxes(0, 1)
    n, m = shape.n_heads, shape.n_kv_heads
    return heads[:n], heads[n : n + m], heads[n + m :]


def sees(segments: np.ndarray, shape: Shape) -> np.ndarray:
    """[rows, rows]: which rows j each row i attends to."""
    i = np.arange(len(segments))[:, None]
    j = np.arange(len(segments))[None, :]
    seen = (j >= segments[:, :1]) & (j <= i)
    return seen if shape.window is None else seen & (i - j < shape.window)


def attention_reference(
    qkv: np.ndarray, segments: np.ndarray, shape: Shape
) -> tuple[np.ndarray, np.ndarray]:
    q, k, v = split_heads(qkv.astype(np.float64), shape)
    seen = sees(segments, shape)
    out = np.zeros((len(qkv), shape.n_heads, shape.head_size))
    lse = np.zeros((len(qkv), shape.n_heads))
    for h in range(shape.n_heads):
        kv = h // (shape.n_heads // shape.n_kv_heads)
        s = shape.scale * q[h] @ k[kv].T
        if shape.softcap is not None:
            s = shape.softcap * np.tanh(s / shape.softcap)
        s = np.where(seen, s, -np.inf)
        highest = s.max(axis=1)
        lse[:, h] = highest + np.log(np.exp(s - highest[:, None]).sum(axis=1))
        out[:, h] = np.exp(s - lse[:, h, None]) @ v[kv]
    return out.reshape(len(qkv), -1), lse


def use_tile(monkeypatch: pytest.MonkeyPatch, tile: Tile) -> None:
    """Makes every attention kernel take that tile."""
    monkeypatch.setattr(forward.attention, "choose_tile", lambda *_: tile)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def activation_of(device: Device, extent: Extent, array: np.ndarray) -> Tensor:
    """The array, f32 or f16, on the device; the recorded rows that are not in use hold NaN."""
    dtype = "f16" if array.dtype == np.float16 else "f32"
    tensor = device.empty((extent.maximum, *array.shape[1:]), dtype, extent=extent)
    padded = np.full(tensor.shape, np.nan, tensor.numpy_dtype)
    padded[: len(array)] = array
    device.write(tensor, padded)
    return tensor


def segments_on(device: Device, extent: Extent, segments: np.ndarray) -> Tensor:
    """The segments on the device; the rows that are not in use claim to see everything."""
    padded = np.tile(np.array([0, extent.maximum], np.uint32), (extent.maximum, 1))
    padded[: len(segments)] = segments
    return device.upload(padded)


def run_attention(
    device: Device, qkv: np.ndarray, segments: np.ndarray, shape: Shape, spare: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """out and lse of all recorded rows, over a fill of -7."""
    extent = device.extent(len(qkv) + spare)
    device.set_rows(extent, len(qkv))
    program = Program(device)
    out, lse = attention(
        program,
        activation_of(device, extent, qkv),
        segments_on(device, extent, segments),
        **shape.options,
    )
    for tensor in (out, lse):
        device.write(tensor, np.full(tensor.shape, -7.0))
    program.run()
    return device.read(out), device.read(lse)


@pytest.mark.parametrize(("lengths", "shape", "tile"), CASES)
def test_attention(
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    shape: Shape,
    tile: Tile,
) -> None:
    rows, spare = sum(lengths), 9
    use_tile(monkeypatch, tile)
    qkv, segments = normal(rows, rows, shape.width), segments_of(lengths)
    out, lse = run_attention(device, qkv, segments, shape, spare)
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
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    shape: Shape,
    tile: Tile,
) -> None:
    if "shader-f16" not in device.features:
        pytest.skip("the adapter lacks shader-f16")
    rows, spare = sum(lengths), 9
    use_tile(monkeypatch, tile)
    qkv, segments = normal(rows, rows, shape.width).astype(np.float16), segments_of(lengths)
    out, lse = run_attention(device, qkv, segments, shape, spare)
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


def test_two_runs_agree_bit_for_bit(device: Device) -> None:
    shape = Shape(9, 3, 64, 0.125, window=37)
    qkv, segments = normal(1, 130, shape.width), segments_of([65, 65])
    first, second = (run_attention(device, qkv, segments, shape) for _ in range(2))
    assert first[0].tobytes() == second[0].tobytes()
    assert first[1].tobytes() == second[1].tobytes()


@pytest.mark.parametrize("tile", [ON_CPU, replace(ON_GPU, per_lane=4, chunk=8)])
@pytest.mark.parametrize("window", [None, 37])
def test_an_example_gives_the_same_bits_wherever_it_lies(
    device: Device, monkeypatch: pytest.MonkeyPatch, window: int | None, tile: Tile
) -> None:
    use_tile(monkeypatch, tile)
    shape = Shape(9, 3, 64, 0.125, window=window)
    qkv, here = normal(1, 170, shape.width), slice(50, 150)
    among = run_attention(device, qkv, segments_of([45, 5, 100, 20]), shape)
    alone = run_attention(device, qkv[here], segments_of([100]), shape)
    assert alone[0].tobytes() == among[0][here].tobytes()
    assert alone[1].tobytes() == among[1][here].tobytes()


def test_tiles_of_as_many_teams_agree_bit_for_bit(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(3, 1, 64, 0.125, window=50)
    qkv, segments = normal(1, 170, shape.width), segments_of([45, 5, 100, 20])
    results = []
    for tile in TILES[3:6]:
        use_tile(monkeypatch, tile)
        results.append(run_attention(device, qkv, segments, shape)[0].tobytes())
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("tile_type", ["f16", "f32"])
@pytest.mark.parametrize("memory", [16384, 32768, 49152])
@pytest.mark.parametrize("kernel", ["attention", "attention_backward_q", "attention_backward_kv"])
@pytest.mark.parametrize("is_cpu", [False, True])
def test_a_chosen_tile_fits_every_head(
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    memory: int,
    is_cpu: bool,
    tile_type: str,
) -> None:
    monkeypatch.setattr(device, "is_cpu", is_cpu)
    monkeypatch.setattr(device, "workgroup_memory", memory)
    for head_size in range(4, 257, 4):
        tiles = [
            choose_tile(kernel, device, rows, 4, head_size, tile_type) for rows in (1, 512, 8192)
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
    device: Device, monkeypatch: pytest.MonkeyPatch, kernel: str, tile_type: str, head_size: int
) -> None:
    monkeypatch.setattr(device, "is_cpu", False)
    monkeypatch.setattr(device, "workgroup_memory", 49152)  # NVIDIA's
    tile = choose_tile(kernel, device, 1 << 20, 4, head_size, tile_type)
    assert tile == GPU_TILES[kernel, tile_type, head_size]


def test_large_scores_and_padding_rows_give_no_nan(device: Device) -> None:
    shape = Shape(9, 3, 64, 0.125)
    qkv = 100.0 * normal(1, 70, shape.width)  # scores of some 1e5: the softmax is one-hot
    lengths = [45, *[1] * 25]  # padding rows are examples of one row
    out, lse = run_attention(device, qkv, segments_of(lengths), shape)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()
    v = qkv.reshape(70, -1, 64)[45:, 12:].repeat(3, axis=1).reshape(25, -1)
    np.testing.assert_array_equal(out[45:], v)  # a row alone: p is exactly 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 8}, "8 query heads cannot share 3 key heads"),
        ({"head_size": 66}, "head_size is 66"),
        ({"head_size": 260}, "head_size is 260"),
        ({"head_size": 32}, "qkv has shape"),
        ({"window": 0}, "window of 0 rows"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"scale": 0.0}, "scale is 0.0"),
    ],
)
def test_what_cannot_be_computed_is_refused(
    device: Device, options: dict[str, Any], message: str
) -> None:
    shape = Shape(9, 3, 64, 0.125)
    extent = device.extent(4)
    qkv = device.empty((4, shape.width), extent=extent)
    segments = device.upload(segments_of([4]))
    with pytest.raises(ValueError, match=message):
        attention(Program(device), qkv, segments, **{**shape.options, **options})
