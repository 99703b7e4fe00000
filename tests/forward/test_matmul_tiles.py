"""Every tile of the tiled matmul, as written out for a GPU too, and the choice among them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from backward.matmul import matmul_backward
from forward.adapter import LoraFactors
from forward.matmul import matmul
from forward.matmul_tiles import TILES, Tile, choose_tile, cut
from forward.weights import load_matrix
from shaders.device import Device
from shaders.program import Program
from tests.forward.test_quantization import random_blocks, tensor_of
from tests.kernels import MARKER, activation, extent_in_use, marked, run_twice

Q4_1 = GGMLQuantizationType.Q4_1
ROWS, IN_USE, N_OUT, N_IN, RANK = 70, 67, 100, 224, 4


@pytest.fixture
def tiled(device: Device) -> Iterator[Device]:
    device.matmul_body = "tiled"
    yield device
    device.matmul_body = None


def force(monkeypatch: pytest.MonkeyPatch, tile: Tile, splits: int) -> None:
    def chosen(rows: int, columns: int, contraction: int, limit: int) -> tuple[Tile, int, int]:
        return tile, *cut(contraction, splits, tile.depth)

    monkeypatch.setattr("forward.matmul.choose_tile", chosen)


# Written out whole, as on a GPU, for one small and the largest: llvmpipe takes seconds for each.
@pytest.mark.parametrize(
    ("tile", "unrolled"),
    [(tile, False) for tile in TILES] + [(TILES[0], True), (TILES[5], True)],
)
@pytest.mark.parametrize("splits", [1, 2])
def test_both_directions(
    tiled: Device, tile: Tile, unrolled: bool, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, tile, splits)
    if unrolled:
        pipeline = tiled.pipeline

        def written_out(template: str, constants: dict[str, Any]) -> Any:
            if template == "matmul_tiled":
                constants = constants | {"unroll": tile.depth}
            return pipeline(template, constants)

        monkeypatch.setattr(tiled, "pipeline", written_out)
    rng = np.random.default_rng(0)
    data = random_blocks(Q4_1, N_OUT, N_IN)
    w = quants.dequantize(data, Q4_1).reshape(N_OUT, N_IN).astype(np.float64)
    matrix = load_matrix(tiled, [tensor_of(Q4_1, data, N_IN)])
    shapes = {"x": N_IN, "z": RANK, "d_y": N_OUT, "d_z": RANK}
    arrays = {k: rng.normal(size=(ROWS, n)).astype(np.float32) for k, n in shapes.items()}
    a, b = (rng.normal(size=s).astype(np.float32) for s in ((RANK, N_IN), (36, RANK)))
    extent = extent_in_use(tiled, ROWS, IN_USE)
    tensors = {name: activation(tiled, array, extent) for name, array in arrays.items()}
    lora = LoraFactors(tiled.upload(a), tiled.upload(b), RANK, 1.5, ((8, 44),))
    out, d_x = marked(tiled, extent, N_OUT), marked(tiled, extent, N_IN)
    forward, backward = Program(tiled), Program(tiled)
    matmul(forward, tensors["x"], matrix, lora=lora, z=tensors["z"], out=out)
    matmul_backward(backward, tensors["d_y"], matrix, lora=lora, d_z=tensors["d_z"], out=d_x)
    x, z, d_y, d_z = (arrays[name].astype(np.float64) for name in ("x", "z", "d_y", "d_z"))
    expected = x @ w.T
    expected[:, 8:44] += 1.5 * z @ b.T
    for program, result, wanted, terms in (
        (forward, out, expected, N_IN + RANK),
        (backward, d_x, d_y @ w + d_z @ a, N_OUT + RANK),
    ):
        found = run_twice(program, result)
        # As in test_matmul.py: errors grow as sqrt(n) · 2^-24 of the largest result.
        bound = 4 * np.sqrt(terms) * 2.0**-24 * np.abs(wanted).max()
        assert np.abs(found[:IN_USE] - wanted[:IN_USE]).max() < bound
        assert (found[IN_USE:] == MARKER).all()


def test_stretches_cover_the_contraction() -> None:
    for contraction in (4, 36, 576, 1536, 49152):
        for splits in (1, 2, 4, 8):
            for depth in (16, 32):
                n, length = cut(contraction, splits, depth)
                assert (n - 1) * length < contraction <= n * length and n <= splits
                assert length % depth == 0


def test_choice() -> None:
    """Small products get small tiles and stretches, large ones large tiles and one pass."""
    small, splits, _ = choose_tile(128, 576, 3072, 16384)
    assert small.tile_rows * small.tile_columns <= 4096 and splits > 1
    large, splits, length = choose_tile(4096, 4096, 4096, 49152)
    assert (large.tile_rows, large.tile_columns, splits, length) == (128, 128, 1, 4096)
    for rows in (1, 100, 5000):
        for columns in (4, 576, 49152):
            for contraction in (4, 576, 49152):
                assert choose_tile(rows, columns, contraction, 16384)[0].workgroup_bytes <= 16384
