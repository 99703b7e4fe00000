"""Products of a few rows with matrices of every tensor type, against float64 numpy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from forward.adapter import LoraFactors
from forward.matmul_row import MAX_ROWS, choose_tiling, matmul_row
from forward.quantization import QUANTIZATIONS
from forward.weights import FrozenMatrix, load_matrix
from shaders.device import Device
from shaders.program import Program
from tests.forward.test_quantization import (
    ALL_TYPES,
    dequantized,
    random_blocks,
    tensor_of,
    type_name,
)
from tests.kernels import MARKER, activation, extent_in_use, marked, run_twice


@pytest.fixture(params=[True, False], ids=["cpu", "gpu"])
def lanes(request: pytest.FixtureRequest, device: Device) -> Iterator[None]:
    """With one lane a sum, and with lanes that share it, on whatever device there is."""
    before = device.is_cpu
    device.is_cpu = request.param
    yield
    device.is_cpu = before


def error_bound(magnitude: np.ndarray, terms: int) -> np.ndarray:
    """Each of n additions rounds the sum so far by at most 2^-24 of Σ |x · w|; their signs are
    random, so that they grow as sqrt(n)."""
    return 2 * np.sqrt(terms) * 2.0**-24 * magnitude


def numbers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("kind", ALL_TYPES, ids=type_name)
@pytest.mark.parametrize(
    ("rows", "in_use", "out_features", "blocks"), [(1, 1, 36, 1), (4, 3, 4, 3), (2, 2, 100, 9)]
)
def test_random_blocks(
    device: Device,
    kind: GGMLQuantizationType,
    rows: int,
    in_use: int,
    out_features: int,
    blocks: int,
) -> None:
    """Outputs that fill no workgroup; widths that fill no step, where the type has such."""
    block_size = QUANTIZATIONS[kind].block_size
    columns = 32 * blocks + 4 if block_size == 1 else block_size * blocks
    tensor = tensor_of(kind, random_blocks(kind, out_features, columns, seed=rows), columns)
    matrix, w = load_matrix(device, [tensor]), dequantized(tensor).astype(np.float64)
    x = numbers(np.random.default_rng(rows), rows, columns)
    extent = extent_in_use(device, rows, in_use)
    y = marked(device, extent, out_features)
    program = Program(device)
    matmul_row(program, activation(device, x, extent), matrix, out=y)
    result = run_twice(program, y)
    bound = error_bound(np.abs(x) @ np.abs(w).T, columns)
    assert (np.abs(result - x @ w.T) <= bound)[:in_use].all()
    assert (result[in_use:] == MARKER).all()


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize(
    ("contraction", "shape"),
    [
        (2048, (128, 2, 0, 0)),
        (4100, (256, 2, 0, 1)),  # half an eight is left
        (8192, (256, 4, 0, 0)),
        (14336, (256, 7, 3, 0)),
        (18464, (256, 9, 1, 4)),
        (18468, (256, 9, 1, 5)),
    ],
)
def test_long_contractions(
    device: Device, rows: int, contraction: int, shape: tuple[int, int, int, int]
) -> None:
    """Rounds of several eights, the rest of them, and eights (`last`) that some lanes have."""
    share, eights, rest, last = shape
    tiling = choose_tiling(False, rows, 20, contraction)
    assert (tiling.share, contraction // 8 // share) == (share, eights)
    assert rows > 1 or eights % tiling.steps == rest
    assert -(-contraction // 8) % share == last
    tensor = tensor_of(
        GGMLQuantizationType.F16,
        random_blocks(GGMLQuantizationType.F16, 20, contraction, seed=rows),
        contraction,
    )
    matrix, w = load_matrix(device, [tensor]), dequantized(tensor).astype(np.float64)
    x = numbers(np.random.default_rng(contraction), rows, contraction)
    extent = extent_in_use(device, rows, rows)
    y = marked(device, extent, 20)
    program = Program(device)
    matmul_row(program, activation(device, x, extent), matrix, out=y)
    bound = error_bound(np.abs(x) @ np.abs(w).T, contraction)
    assert (np.abs(run_twice(program, y) - x @ w.T) <= bound).all()


def stacked(device: Device, out_features: list[int], columns: int) -> tuple[FrozenMatrix, ...]:
    """A matrix of several tensors of two types (two parts), and what it decodes to."""
    kinds = [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q8_0]
    tensors = [
        tensor_of(kind, random_blocks(kind, n, columns, seed=n), columns)
        for kind, n in zip(kinds, out_features, strict=True)
    ]
    return load_matrix(device, tensors), np.concatenate([dequantized(t) for t in tensors])


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("rank", [4, 16, 40])
@pytest.mark.parametrize("adapted", [(0, 2), (1,), (0, 1, 2)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_adapters_bias_cap_and_residual(
    device: Device, rank: int, adapted: tuple[int, ...], softcap: float | None
) -> None:
    """Some members of a stacked matrix are adapted, across its parts."""
    rows, columns, sizes, scale = 2, 96, [36, 8, 20], 1.5
    matrix, w = stacked(device, sizes, columns)
    assert len(matrix.parts) == 2
    rng = np.random.default_rng(rank)
    starts = np.cumsum([0, *sizes])
    ranges = tuple((int(starts[i]), int(starts[i + 1])) for i in adapted)
    n_out = sum(sizes)
    x, residual = numbers(rng, rows, columns), numbers(rng, rows, n_out)
    z = numbers(rng, rows, len(adapted) * rank)
    b, bias = numbers(rng, sum(sizes[i] for i in adapted), rank), numbers(rng, n_out)
    extent = extent_in_use(device, rows, rows)
    lora = LoraFactors(
        device.empty((len(adapted) * rank, columns)), device.upload(b), rank, scale, ranges
    )
    y = marked(device, extent, n_out)
    program = Program(device)
    matmul_row(
        program, activation(device, x, extent), matrix, lora=lora,
        z=activation(device, z, extent), bias=device.upload(bias), softcap=softcap,
        residual=activation(device, residual, extent), out=y,
    )  # fmt: skip
    result = run_twice(program, y)

    product = x.astype(np.float64) @ w.T + bias
    magnitude = np.abs(x) @ np.abs(w).T + np.abs(bias)
    first = 0
    for index, (start, stop) in enumerate(ranges):
        low = z[:, index * rank : (index + 1) * rank].astype(np.float64)
        factor = b[first : first + stop - start]
        product[:, start:stop] += scale * low @ factor.T
        magnitude[:, start:stop] += scale * np.abs(low) @ np.abs(factor).T
        first += stop - start
    bound = error_bound(magnitude, columns + rank)
    if softcap is not None:
        product = softcap * np.tanh(product / softcap)
        bound += 1e-5 * softcap  # WGSL's tanh: 2^-11 at worst, drivers seen stay below 2^-18
    expected = product + residual
    assert (np.abs(result - expected) <= bound + 2.0**-23 * np.abs(expected)).all()


@pytest.mark.parametrize("contraction", [4, 32, 128, 576, 1536, 2048, 4096, 8192, 14336])
@pytest.mark.parametrize("columns", [4, 576, 2048, 16384, 128256])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_lanes_have_work(rows: int, columns: int, contraction: int) -> None:
    """A GPU's lanes: two eights each where the contraction has them, and all loads in use."""
    tiling = choose_tiling(False, rows, columns, contraction)
    assert tiling.share in (8, 16, 32, 64, 128, 256)
    assert tiling.lanes % tiling.share == 0
    assert tiling.share == 8 or contraction >= 16 * tiling.share
    assert tiling.steps == 1 or 8 * tiling.share * tiling.steps <= contraction
    assert tiling.steps * rows <= 4  # a lane's registers hold what it loads at once


def test_wrong_shapes_are_refused(device: Device) -> None:
    matrix, _ = stacked(device, [4, 4, 4], 32)
    extent = extent_in_use(device, MAX_ROWS + 1, 1)
    x = activation(device, np.zeros((MAX_ROWS + 1, 32), np.float32), extent)
    with pytest.raises(ValueError, match="up to 4 rows, not 5"):
        matmul_row(Program(device), x, matrix)
    extent = extent_in_use(device, 1, 1)
    x = activation(device, np.zeros((1, 36), np.float32), extent)
    with pytest.raises(ValueError, match="matmul_row input has shape"):
        matmul_row(Program(device), x, matrix)
