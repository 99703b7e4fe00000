"""What tests of products of one row share."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType

from lora.checks.references.int_row import decoded_int_row
from lora.forward.int_row import BLOCK
from lora.forward.model.weights import FrozenMatrix, load_matrix
from lora.shaders.recording import Recording
from tests.support.quantized_tensors import (
    dequantized,
    random_blocks,
    tensor_of,
)

EPSILON = 1e-5


def numbers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def random_matrix(
    recording: Recording, kind: GGMLQuantizationType, out_features: int, columns: int, seed: int
) -> tuple[FrozenMatrix, np.ndarray]:
    """A matrix on the device, and what it decodes to."""
    tensor = tensor_of(kind, random_blocks(kind, out_features, columns, seed=seed), columns)
    return load_matrix(recording, [tensor]), dequantized(tensor).astype(np.float64)


def check_int_row(words: np.ndarray, v: np.ndarray, y: np.ndarray, error: float = 0.0) -> None:
    """Each number within half a step of its block's scale, the sums as f32 sums are.

    Args:
        v: f64 [width], what the numbers stand for.
        y: f64 [width], of which the squares are.
        error: of v itself, a share of the block's largest.
    """
    values, about = decoded_int_row(words, v.size)
    largest = np.abs(v.reshape(-1, BLOCK)).max(axis=1)
    # Half a step is 2^-23 of the largest; scaling rounds a number twice, by 2^-24 of it each time.
    steps = np.repeat(largest, BLOCK) * (2.0**-22 + error) * 1.01
    assert (np.abs(values - v) <= steps).all()
    halves = v.reshape(-1, 2, BLOCK // 2)
    sizes = np.abs(halves).sum(axis=2)
    assert (np.abs(about[:, 1:3] - halves.sum(axis=2)) <= sizes * (2.0**-21 + error)).all()
    squares = (y.reshape(-1, BLOCK) ** 2).sum(axis=1)
    np.testing.assert_allclose(about[:, 3], squares, rtol=2.0**-20 + 2 * error)
