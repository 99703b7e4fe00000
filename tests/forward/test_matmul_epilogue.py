"""Bias, soft cap and residual after a product, in one pass and in two, both bodies."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from lora.forward.matmul import matmul
from lora.forward.model.weights import load_matrix
from lora.forward.plans.matmul_tiles import PlanSpace, choose_plan, tiles_of
from lora.forward.product import Product, ScaledColumns
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.bodies import body as body
from tests.support.bodies import recording as recording
from tests.support.kernels import MARKER, activation, extent_in_use, marked, run_twice
from tests.support.quantized_tensors import random_blocks, tensor_of

F32 = GGMLQuantizationType.F32


@pytest.mark.parametrize(
    ("rows", "in_use", "n_out", "n_in", "with_bias", "softcap", "with_residual", "scaled"),
    [
        (7, 5, 36, 100, True, 3.0, True, False),
        (33, 33, 68, 1024, False, None, False, False),
        (33, 33, 68, 1024, True, 3.0, False, False),
        (33, 33, 68, 1024, True, None, True, False),
        (33, 33, 68, 1024, False, 3.0, True, False),
        (7, 5, 36, 100, True, None, True, True),
        (33, 33, 68, 1024, False, None, True, True),
        (33, 30, 68, 1024, True, None, False, True),
    ],
)
def test_epilogue(
    recording: Recording, body: str, rows: int, in_use: int, n_out: int, n_in: int, with_bias: bool,
    softcap: float | None, with_residual: bool, scaled: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rng = np.random.default_rng(n_in)
    data = random_blocks(F32, n_out, n_in)
    row_bytes = 4 * n_in
    monkeypatch.setattr(
        "lora.forward.model.weights.CPU_PART_BYTES", 64 * row_bytes
    )  # two parts of 68 rows
    monkeypatch.setattr("lora.forward.model.weights.MAX_PART_BYTES", 64 * row_bytes)
    matrix = load_matrix(recording, [tensor_of(F32, data, n_in)])
    w = quants.dequantize(data, F32).reshape(n_out, n_in).astype(np.float64)
    x = (4 / np.sqrt(n_in) * rng.normal(size=(rows, n_in))).astype(np.float32)
    bias = 3 * rng.normal(size=n_out).astype(np.float32)
    residual = rng.normal(size=(rows, n_out)).astype(np.float32)
    extent = extent_in_use(recording, rows, in_use)
    out, kept = marked(recording, extent, n_out), marked(recording, extent, n_out)
    scales, program = rng.uniform(0.5, 2, n_out).astype(np.float32), Program(recording)
    columns = ScaledColumns(recording.memory.upload(scales), kept) if scaled else None
    matmul(
        program,
        Product(
            activation(recording, x, extent),
            matrix,
            bias=recording.memory.upload(bias) if with_bias else None,
            softcap=softcap,
            residual=activation(recording, residual, extent) if with_residual else None,
            scaled=columns,
        ),
        out=out,
    )
    result = run_twice(program, out)
    product = x.astype(np.float64) @ w.T
    expected = product * (scales if scaled else 1.0) + with_bias * bias
    if softcap is not None:
        expected = softcap * np.tanh(expected / softcap)
    expected += with_residual * residual
    # Sums of up to 1024 products of about 4 / sqrt(1024), then additions: a few 2^-24 of 16;
    # tanh itself is good for about 2^-11 relative on some drivers, for 1e-6 on those tested.
    np.testing.assert_allclose(result[:in_use], expected[:in_use], atol=2e-5)
    assert (result[in_use:] == MARKER).all()
    found = recording.memory.read(kept)
    if scaled:
        np.testing.assert_allclose(found[:in_use], product[:in_use], atol=2e-5)
    assert (found[in_use if scaled else 0 :] == MARKER).all()


def test_the_long_shape_takes_two_passes() -> None:
    assert choose_plan(PlanSpace(33, 64, 1024, tiles_of(False, 16384))).splits > 1


def test_a_vocabulary_that_is_no_multiple_of_four(recording: Recording, body: str) -> None:
    """Its head is padded with rows of zeros, and the logits with columns of zeros."""
    data = random_blocks(F32, 30, 64)
    matrix = load_matrix(recording, [tensor_of(F32, data, 64)])
    assert matrix.out_features == 32
    w = quants.dequantize(data, F32).reshape(30, 64)
    x = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    extent = recording.memory.extent(5)
    out = marked(recording, extent, 32)
    program = Program(recording)
    matmul(program, Product(activation(recording, x, extent), matrix, softcap=30.0), out=out)
    result = run_twice(program, out)
    expected = 30 * np.tanh(x.astype(np.float64) @ w.T / 30)
    np.testing.assert_allclose(result[:, :30], expected, atol=2e-5)
    assert (result[:, 30:] == 0).all()
