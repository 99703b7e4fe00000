"""What tests of attention and of its gradient share: cases, numpy's answer, their tensors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora.checks.references.attention import Shape
from lora.forward import attention as forward_attention
from lora.forward.attention import Tile
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor

ON_CPU = Tile(prefetch=False)  # what software drivers take, apart from its size
ON_GPU = Tile(teams=2, per_lane=2)  # two teams, and within the 32 KiB of this device
# A driver compiles each row of a lane and each column of a turn, and llvmpipe takes three times as
# long where barriers are inside of one loop more: over a head's chunks, and over own tiles that are
# not held. Few cases have these. Tiles are small but for a software driver's.
TILES = [
    ON_CPU,
    replace(ON_CPU, per_lane=2, chunk=8, held=False, unroll=8),
    Tile(per_lane=1, chunk=32),
    replace(ON_GPU, chunk=8, per_lane=4, unroll=1),
    replace(ON_GPU, chunk=8, held=False, unroll=1),
    Tile(teams=2, team_lanes=128, per_lane=1, chunk=8, held=False),
    Tile(teams=4, per_lane=1, chunk=8, prefetch=False, unroll=1),
    Tile(team_lanes=128, per_lane=1, chunk=16, unroll=1),
    Tile(teams=2, slices=2, per_lane=1, unroll=1),
    Tile(team_lanes=128, slices=4, chunk=32, per_lane=2, held=False, unroll=1),
    Tile(team_lanes=256, slices=4, chunk=32, held=False, per_lane=1, unroll=1),
]

# A head of two chunks of 8. Tests take it wherever they can: a driver compiles one kernel for them.
WINDOWED = Shape(3, 1, 64, 0.125, window=37)

# Lengths of the examples that lie end to end, the shape, and the tile.
CASES = [
    ([1], Shape(1, 1, 4, 0.5), TILES[1]),
    ([7], Shape(3, 1, 20, 0.7, window=1), TILES[1]),
    ([33, 5, 92], WINDOWED, ON_CPU),
    ([1, 63, 1], WINDOWED, TILES[4]),
    ([65, 65], WINDOWED, TILES[3]),
    ([70, 50], WINDOWED, TILES[3]),
    ([130], Shape(2, 1, 28, 0.1, window=64), TILES[6]),
    ([130], Shape(4, 2, 96, 0.1), TILES[2]),
    ([40, 23], Shape(4, 1, 64, 0.11, softcap=5.0, window=20), TILES[7]),
    ([33, 5, 4, 20], Shape(3, 1, 64, 0.2, softcap=2.0), TILES[8]),
    ([40, 26], Shape(2, 1, 128, 0.08, window=20), TILES[9]),
    ([3, 51], Shape(2, 1, 256, 0.0625), TILES[10]),
    ([3, 40], Shape(2, 1, 512, 0.05, window=30), TILES[10]),
]

# Rows for which the gradient sums all query heads of a key head in one kernel, which compiles many
# times as long: one of small heads, and one with a team more.
UNSPLIT = (7, 65)

# The same with f16 tensors.
HALF_CASES = [
    ([33, 5, 92], Shape(3, 1, 20, 0.2, window=37), TILES[1]),
    ([33, 5, 3, 20, 69], Shape(3, 1, 64, 0.125), Tile(teams=2, half=True, unroll=1)),
    ([65, 64], Shape(2, 2, 48, 0.1, softcap=5.0), Tile(per_lane=2, held=False, half=True)),
    ([40, 26], Shape(2, 1, 128, 0.08, window=20), replace(TILES[9], half=True)),
]


def use_tile(monkeypatch: pytest.MonkeyPatch, tile: Tile) -> None:
    """Makes every attention kernel take that tile."""
    monkeypatch.setattr(forward_attention, "choose_tile", lambda *_: tile)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def activation_of(recording: Recording, extent: Extent, array: np.ndarray) -> Tensor:
    """The array, f32 or f16, on the device; the recorded rows that are not in use hold NaN."""
    dtype = "f16" if array.dtype == np.float16 else "f32"
    tensor = recording.memory.empty((extent.maximum, *array.shape[1:]), dtype, extent=extent)
    padded = np.full(tensor.shape, np.nan, tensor.numpy_dtype)
    padded[: len(array)] = array
    recording.memory.write(tensor, padded)
    return tensor


def segments_on(recording: Recording, extent: Extent, segments: np.ndarray) -> Tensor:
    """The segments on the device; the rows that are not in use claim to see everything."""
    padded = np.tile(np.array([0, extent.maximum], np.uint32), (extent.maximum, 1))
    padded[: len(segments)] = segments
    return recording.memory.upload(padded)
