"""Products with matrices of every tensor type, forward and to the input, against float64 numpy."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from lora.backward.matmul import matmul_backward
from lora.checks.references.matmul import product_gradient_reference, product_reference
from lora.forward.gguf.file import GGUFFile, GGUFTensor
from lora.forward.gguf.quantization import QUANTIZATIONS
from lora.forward.matmul import matmul
from lora.forward.model.weights import load_matrix
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
from tests.support.quantized_tensors import (
    ALL_TYPES,
    dequantized,
    first_rows,
    random_blocks,
    tensor_of,
)
from tests.support.short_kernels import short_kernels


@pytest.fixture(scope="module", autouse=True)
def kernels_are_short() -> Iterator[None]:
    """A type is decoded alike for all rows of a lane; test_matmul.py has as many as runs have."""
    with short_kernels():
        yield


def test_reference_gradient_is_the_derivative() -> None:
    rng = np.random.default_rng(0)
    w, d_y = rng.normal(size=(6, 8)), rng.normal(size=(4, 6))
    x, direction = rng.normal(size=(4, 8)), rng.normal(size=(4, 8))

    def loss(v: np.ndarray) -> float:
        return float((product_reference(v, w) * d_y).sum())

    expected = (product_gradient_reference(d_y, w) * direction).sum()
    assert central_difference(loss, x, direction) == pytest.approx(expected, rel=1e-8)


def check(recording: Recording, tensor: GGUFTensor, rows: int, in_use: int) -> None:
    """Both directions, over `in_use` of `rows` rows."""
    matrix, w = load_matrix(recording, [tensor]), dequantized(tensor)
    n_out, n_in = w.shape
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, n_in)).astype(np.float32)
    d_y = rng.normal(size=(rows, n_out)).astype(np.float32)
    extent = extent_in_use(recording, rows, in_use)
    y, d_x = marked(recording, extent, n_out), marked(recording, extent, n_in)
    forward, backward = Program(recording), Program(recording)
    matmul(forward, Product(activation(recording, x, extent), matrix), out=y)
    matmul_backward(backward, activation(recording, d_y, extent), matrix, out=d_x)
    for name, result, expected, magnitude, terms in (
        ("y", run_twice(forward, y), product_reference(x, w),
         product_reference(np.abs(x), np.abs(w)), n_in),
        ("d_x", run_twice(backward, d_x), product_gradient_reference(d_y, w),
         product_gradient_reference(np.abs(d_y), np.abs(w)), n_out),
    ):  # fmt: skip
        # The weights are exact. Each of n additions rounds the sum so far by at most 2^-24 of it,
        # and that is at most Σ |x · w|; the errors' signs are random, so they grow as sqrt(n).
        bound = 2 * np.sqrt(terms) * 2.0**-24 * magnitude[:in_use]
        assert (np.abs(result[:in_use] - expected[:in_use]) <= bound).all(), name
        assert (result[in_use:] == MARKER).all(), name


@pytest.mark.parametrize(
    ("kind", "rows", "in_use", "out_features", "blocks"),
    [(kind, 130, 129, 68, 3) for kind in ALL_TYPES]
    # Of each size of a block one.
    + [(GGMLQuantizationType[name], 1, 1, 36, 1) for name in ("F16", "Q4_0", "Q6_K")]
    + [(GGMLQuantizationType.Q5_1, 7, 5, 4, 3)],
    ids=lambda value: getattr(value, "name", None),
)
def test_random_blocks(
    recording: Recording,
    body: str,
    kind: GGMLQuantizationType,
    rows: int,
    in_use: int,
    out_features: int,
    blocks: int,
) -> None:
    """Rows and outputs that fill no tile; widths that fill no step, where the type has such."""
    block_size = QUANTIZATIONS[kind].block_size
    columns = 32 * blocks + 4 if block_size == 1 else block_size * blocks
    data = random_blocks(kind, out_features, columns, seed=rows)
    check(recording, tensor_of(kind, data, columns), rows, in_use)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("token_embd.weight", "Q8_0"),
        ("blk.0.ffn_gate.weight", "Q5_0"),
        ("blk.0.attn_output.weight", "Q4_K"),
        ("blk.0.ffn_down.weight", "Q6_K"),
    ],
)
def test_real_tensors(recording: Recording, body: str, gemma3: Path, name: str, kind: str) -> None:
    tensor = first_rows(GGUFFile(gemma3).tensors[name], 700)
    assert tensor.type.name == kind
    check(recording, tensor, 33, 31)
