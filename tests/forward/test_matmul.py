"""Products with frozen matrices, forward and to the input, against float64 numpy; both bodies."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from lora.backward.matmul import matmul_backward
from lora.checks.references.matmul import matmul_reference
from lora.forward.matmul import matmul
from lora.forward.model.factors import LoraFactors
from lora.forward.model.weights import FrozenMatrix, load_matrix
from lora.forward.product import Product
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.bodies import body as body
from tests.support.bodies import recording as recording
from tests.support.kernels import (
    MARKER,
    activation,
    central_difference,
    extent_in_use,
    marked,
    run_twice,
)
from tests.support.quantized_tensors import random_blocks, tensor_of

F32, F16, Q4_1, Q8_0 = (GGMLQuantizationType[name] for name in ("F32", "F16", "Q4_1", "Q8_0"))


def test_reference_gradient_is_the_derivative() -> None:
    """With z = x Aᵀ: d_x = d_y W + d_z A, d_z_g = scale · d_y_g B_g."""
    rng = np.random.default_rng(0)
    ranges, rank, scale = [(0, 6), (9, 13)], 3, 1.7
    w, a, b = rng.normal(size=(13, 8)), rng.normal(size=(6, 8)), rng.normal(size=(10, 3))
    x, direction, d_y = rng.normal(size=(4, 8)), rng.normal(size=(4, 8)), rng.normal(size=(4, 13))

    def loss(v: np.ndarray) -> float:
        return float((matmul_reference(v, w, v @ a.T, b, ranges, rank, scale) * d_y).sum())

    d_z = np.concatenate([scale * d_y[:, :6] @ b[:6], scale * d_y[:, 9:13] @ b[6:]], axis=1)
    expected = ((d_y @ w + d_z @ a) * direction).sum()
    assert central_difference(loss, x, direction) == pytest.approx(expected, rel=1e-8)


def check(
    recording: Recording, matrix: FrozenMatrix, w: np.ndarray, rows: int, in_use: int,
    ranges: list[tuple[int, int]], rank: int,
) -> None:  # fmt: skip
    """Both directions with residual and low-rank part against the reference."""
    n_out, n_in = w.shape
    rng = np.random.default_rng(rows)
    scale = 1.5
    width = len(ranges) * rank
    x, residual, d_y, z, d_z, a = (
        rng.normal(size=shape).astype(np.float32)
        for shape in (
            (rows, n_in), (rows, n_out), (rows, n_out), (rows, width), (rows, width), (width, n_in)
        )
    )  # fmt: skip
    b = rng.normal(size=(sum(stop - start for start, stop in ranges), rank)).astype(np.float32)
    extent = extent_in_use(recording, rows, in_use)
    lora = None
    z_t = d_z_t = None
    if ranges:
        lora = LoraFactors(
            recording.memory.upload(a), recording.memory.upload(b), rank, scale, tuple(ranges)
        )
        z_t, d_z_t = activation(recording, z, extent), activation(recording, d_z, extent)
    out, d_x = marked(recording, extent, n_out), marked(recording, extent, n_in)
    program = Program(recording)
    matmul(
        program,
        Product(
            activation(recording, x, extent),
            matrix,
            lora=lora,
            z=z_t,
            residual=activation(recording, residual, extent),
        ),
        out=out,
    )
    y = run_twice(program, out)
    program = Program(recording)
    matmul_backward(
        program, activation(recording, d_y, extent), matrix, lora=lora, d_z=d_z_t, out=d_x
    )
    gradient = run_twice(program, d_x)
    expected = residual + matmul_reference(x, w, z, b, ranges, rank, scale)
    expected_gradient = d_y.astype(np.float64) @ w + d_z.astype(np.float64) @ a
    for name, result, wanted, terms in (
        ("y", y, expected, n_in + rank),
        ("d_x", gradient, expected_gradient, n_out + width),
    ):
        # A sum of n products rounded to f32: errors grow as sqrt(n) · 2^-24 of the largest result.
        bound = 4 * np.sqrt(terms) * 2.0**-24 * np.abs(wanted).max()
        assert np.abs(result[:in_use] - wanted[:in_use]).max() < bound, name
        assert (result[in_use:] == MARKER).all(), name


@pytest.mark.parametrize(("rows", "in_use"), [(1, 1), (7, 5), (130, 129)])
def test_rows(recording: Recording, body: str, rows: int, in_use: int) -> None:
    """All types at odd shapes: test_quantized_matmul.py."""
    data = random_blocks(Q4_1, 36, 96)
    w = quants.dequantize(data, Q4_1).reshape(36, 96)
    matrix = load_matrix(recording, [tensor_of(Q4_1, data, 96)])
    check(recording, matrix, w, rows, in_use, [(0, 36)], 4)


@pytest.mark.parametrize(
    ("outs", "ranges", "rank"),
    [
        ((4,), [], 0),
        ((36, 12, 12), [(0, 36), (36, 48), (48, 60)], 8),
        ((100, 36, 36), [(0, 100), (136, 172)], 16),  # q and v adapted, k not
        ((192,), [(0, 192)], 64),
    ],
)
def test_stacked_members(
    recording: Recording, body: str, outs: tuple[int, ...], ranges: list[tuple[int, int]], rank: int
) -> None:
    data = [random_blocks(Q4_1, n, 576, seed=i) for i, n in enumerate(outs)]
    w = np.concatenate([quants.dequantize(d, Q4_1).reshape(-1, 576) for d in data])
    matrix = load_matrix(recording, [tensor_of(Q4_1, d, 576) for d in data])
    assert len(matrix.parts) == 1
    check(recording, matrix, w, 67, 60, ranges, rank)


def test_mixed_types_in_a_stack(recording: Recording, body: str) -> None:
    kinds = (Q4_1, Q8_0, F16)
    data = [random_blocks(kind, 20 + 4 * i, 64, seed=i) for i, kind in enumerate(kinds)]
    w = np.concatenate(
        [quants.dequantize(d, k).reshape(-1, 64) for d, k in zip(data, kinds, strict=True)]
    )
    matrix = load_matrix(recording, [tensor_of(k, d, 64) for d, k in zip(data, kinds, strict=True)])
    assert len(matrix.parts) == 3
    check(recording, matrix, w, 13, 12, [(0, 20), (20, 44), (44, 72)], 4)


def test_split_by_the_largest_binding(
    recording: Recording, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random_blocks(Q8_0, 180, 64)
    w = quants.dequantize(data, Q8_0).reshape(180, 64)
    monkeypatch.setattr("lora.forward.model.weights.CPU_PART_BYTES", 10_000)
    monkeypatch.setattr("lora.forward.model.weights.MAX_PART_BYTES", 10_000)
    matrix = load_matrix(recording, [tensor_of(Q8_0, data, 64)])
    assert len(matrix.parts) == 3
    check(recording, matrix, w, 10, 9, [(0, 100), (104, 180)], 8)


def test_widths_that_are_no_multiple_of_four_are_refused(recording: Recording) -> None:
    data = random_blocks(F32, 8, 6)
    matrix = load_matrix(recording, [tensor_of(F32, data, 6)])
    x = recording.memory.empty((2, 6), extent=recording.memory.extent(2))
    with pytest.raises(ValueError, match="multiples of 4"):
        matmul(Program(recording), Product(x, matrix))
