"""Written tensors, decoded by gguf-py: errors beside simple reference quantizers."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from lora.forward.gguf.quantization import QUANTIZATIONS, quantize

SEARCHED = [kind.name for kind, entry in QUANTIZATIONS.items() if entry.write is not None]

# Relative root mean square error on normal numbers that llama.cpp's own quantizers reach without an
# importance matrix (ggml_quantize_chunk of ggml as in xllamacpp 2026-10, 262,144 numbers; measured
# again by tests/parity/test_export.py).
GGML_ERRORS = {
    "Q8_0": 0.00536,
    "Q4_0": 0.0861,
    "Q4_1": 0.0783,
    "Q5_0": 0.0428,
    "Q5_1": 0.0379,
    "IQ4_NL": 0.0762,
    "Q2_K": 0.2970,
    "Q3_K": 0.1509,
    "Q4_K": 0.0715,
    "Q5_K": 0.0362,
    "Q6_K": 0.0178,
    "IQ4_XS": 0.0768,
}


def decoded(values: np.ndarray, name: str) -> np.ndarray:
    stored = quantize(values, Type[name])
    block_size, block_bytes = GGML_QUANT_SIZES[Type[name]]
    assert stored.dtype == np.uint8
    assert stored.shape == (len(values), values.shape[1] // block_size * block_bytes)
    return gguf.quants.dequantize(stored, Type[name])


def relative_error(values: np.ndarray, name: str) -> float:
    return float(np.linalg.norm(decoded(values, name) - values) / np.linalg.norm(values))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)


@pytest.mark.parametrize("name", GGML_ERRORS)
def test_no_worse_than_ggml(name: str) -> None:
    # 65,536 numbers: the error itself varies by 0.2 %.
    assert relative_error(normal(64, 1024), name) < 1.005 * GGML_ERRORS[name]


@pytest.mark.parametrize(("name", "bits"), [("F32", 24), ("F16", 11), ("BF16", 8)])
def test_plain_types_round(name: str, bits: int) -> None:
    values = normal(8, 64) + np.float32(1)  # no subnormal f16
    np.testing.assert_allclose(decoded(values, name), values, rtol=2.0**-bits)


def test_every_tensor_type_can_be_written() -> None:
    for kind in QUANTIZATIONS:
        assert relative_error(normal(4, 512), kind.name) < 0.4  # Q2_K: 0.27


@pytest.mark.parametrize("name", SEARCHED)
def test_what_was_quantized_stays(name: str) -> None:
    """A second time the levels are there already: nearly all weights come back as they are."""
    once = decoded(normal(32, 1024), name)
    twice = decoded(once, name)
    # K-quants round their scales again; 6e-4 measured. A fresh rounding changes 1.7e-2 and more.
    assert np.linalg.norm(twice - once) < 2e-3 * np.linalg.norm(once)


@pytest.mark.parametrize("name", SEARCHED)
def test_odd_blocks(name: str) -> None:
    """Blocks of zeros, of one number, of one sign, with one outlier, of very small numbers."""
    columns = GGML_QUANT_SIZES[Type[name]][0]
    values = np.zeros((10, columns), np.float32)
    values[1], values[2] = 0.5, -0.5
    values[3] = np.abs(normal(columns, seed=1)) + 0.1
    values[4] = -values[3]
    values[5] = normal(columns, seed=2)
    values[5, 7] = 3.0
    values[6] = normal(columns, seed=2)
    values[6, 9] = -3.0
    values[7] = 1e-30
    values[8, -1] = 1.0
    values[9] = 1e-4 * normal(columns, seed=3)  # scales are subnormal f16, or 0
    with np.errstate(all="raise", under="ignore"):
        found = decoded(values, name)
    assert (found[0] == 0).all()
    np.testing.assert_allclose(found[7], 0, atol=1e-20)
    error = np.linalg.norm(found - values, axis=1)
    size = np.linalg.norm(values, axis=1)
    # Constant blocks fall on a level but for the rounding of scales; others are off by half a level
    # and by what cutting off the largest weight may add.
    assert (error[1:3] < 0.03 * size[1:3]).all()
    step = {"Q2_K": 1 / 3, "Q3_K": 1 / 4}.get(name, 1 / 7)
    for row in (3, 4, 5, 6, 8):
        largest = np.abs(values[row]).max()
        assert np.abs(found[row] - values[row]).max() < 0.75 * step * largest, row
    # 2e-6 each: d of Q4_K is 0 then, and d_min the smallest f16, 6e-8, times up to 63.
    assert np.abs(found[9] - values[9]).max() < 2e-5


@pytest.mark.parametrize("name", SEARCHED)
def test_rows_do_not_depend_on_their_neighbours(name: str) -> None:
    values = normal(300, 512)  # several batches
    whole = quantize(values, Type[name])
    np.testing.assert_array_equal(whole[77:80], quantize(values[77:80], Type[name]))


def test_columns_must_be_whole_blocks() -> None:
    with pytest.raises(ValueError, match="no whole blocks of 256"):
        quantize(normal(2, 288), Type.Q4_K)
