"""Every tensor type on the device against gguf's own dequantization, through the embedding.

Equal to the bit: d has 11 significant bits and q at most 8, so that d · q is exact in f32, and
d · q + m is rounded once, fused or not.
"""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from forward.embedding import embedding
from forward.gguf_file import GGUFFile, GGUFTensor
from forward.quantization import QUANTIZATIONS
from forward.weights import load_matrix
from shaders.device import Device
from shaders.program import Program
from tests.kernels import MARKER, activation, extent_in_use, marked, run_twice

TYPES = list(QUANTIZATIONS)


def random_blocks(kind: GGMLQuantizationType, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random bytes of whole rows, scales of both signs and zero among them, all finite."""
    rng = np.random.default_rng(seed)
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16):
        values = rng.normal(size=(rows, columns)).astype(np.float32)
        values[0, 0] = 0.0
        return quants.quantize(values, kind).view(np.uint8).reshape(rows, -1)
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    n_scales = {GGMLQuantizationType.Q8_0: 1, GGMLQuantizationType.Q4_1: 2}[kind]
    blocks = rng.integers(0, 256, (rows, columns // block_size, block_bytes)).astype(np.uint8)
    scales = rng.normal(size=(*blocks.shape[:2], n_scales)).astype(np.float16)
    scales[0, 0] = 0.0
    blocks[:, :, : 2 * n_scales] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


def tensor_of(kind: GGMLQuantizationType, data: np.ndarray, columns: int) -> GGUFTensor:
    return GGUFTensor(name="test", type=kind, shape=(len(data), columns), data=data)


def first_rows(tensor: GGUFTensor, rows: int) -> GGUFTensor:
    data = tensor.data[:rows]
    return GGUFTensor(tensor.name, tensor.type, (len(data), tensor.shape[1]), data)


def decode_on_device(device: Device, tensors: list[GGUFTensor]) -> np.ndarray:
    """All rows of a matrix, looked up as embeddings."""
    matrix = load_matrix(device, tensors)
    extent = extent_in_use(device, matrix.out_features + 2, matrix.out_features)
    tokens = np.concatenate([np.arange(matrix.out_features), [0, 0]])
    out = marked(device, extent, matrix.in_features)
    program = Program(device)
    embedding(program, activation(device, tokens, extent), matrix, extent, out=out)
    result = run_twice(program, out)
    assert (result[-2:] == MARKER).all()
    return result[:-2]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (3, 2), (67, 3), (130, 18)])
def test_random_blocks(
    device: Device, kind: GGMLQuantizationType, rows: int, blocks: int
) -> None:  # an odd and an even number of blocks, or 4, 36, 68, 548 columns
    columns = 32 * blocks - (28 if QUANTIZATIONS[kind].block_size == 1 else 0)
    data = random_blocks(kind, rows, columns)
    expected = quants.dequantize(data, kind).reshape(rows, columns)
    result = decode_on_device(device, [tensor_of(kind, data, columns)])
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("kind", TYPES)
def test_split_by_the_largest_binding(
    device: Device, kind: GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """150 rows in parts of 64: what a tensor larger than one binding becomes."""
    data = random_blocks(kind, 150, 32)
    row_bytes = 4 * QUANTIZATIONS[kind].row_words(32)
    monkeypatch.setattr(device, "max_binding", max(100 * row_bytes, 160 * 32 * 4))
    monkeypatch.setattr("forward.weights.CPU_PART_BYTES", 100 * row_bytes)
    monkeypatch.setattr("forward.weights.MAX_PART_BYTES", 100 * row_bytes)
    matrix = load_matrix(device, [tensor_of(kind, data, 32)])
    assert [(part.first_row, part.n_rows) for part in matrix.parts] == [
        (0, 64),
        (64, 64),
        (128, 22),
    ]
    expected = quants.dequantize(data, kind).reshape(150, 32)
    result = decode_on_device(device, [tensor_of(kind, data, 32)])
    np.testing.assert_array_equal(result, expected)


def test_a_stack_of_two_types(device: Device) -> None:
    tensors, expected = [], []
    for index, kind in enumerate((GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0)):
        data = random_blocks(kind, 20 + index, 64, index)
        tensors.append(tensor_of(kind, data, 64))
        expected.append(quants.dequantize(data, kind).reshape(-1, 64))
    result = decode_on_device(device, tensors)
    np.testing.assert_array_equal(result, np.concatenate(expected))


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0])
def test_subnormal_scales(device: Device, kind: GGMLQuantizationType) -> None:
    """Blocks of nearly equal weights have scales below f16's normal numbers (6.1e-5)."""
    data = random_blocks(kind, 3, 64).reshape(3, 2, -1)
    data[:, :, :2] = np.array([[1, 0x83FF], [0x0155, 0x8001], [0x03FF, 0x8000]], "<u2")[
        ..., None
    ].view(np.uint8)
    data = data.reshape(3, -1)
    expected = quants.dequantize(data, kind).reshape(3, 64)
    assert (expected != 0).any()
    result = decode_on_device(device, [tensor_of(kind, data, 64)])
    np.testing.assert_array_equal(result, expected)


def test_real_tensors(device: Device, smollm2: Path) -> None:
    file = GGUFFile(smollm2)
    for name in ("blk.7.attn_q.weight", "blk.29.ffn_down.weight", "token_embd.weight"):
        tensor = first_rows(file.tensors[name], 700)
        expected = quants.dequantize(np.array(tensor.data), tensor.type)
        result = decode_on_device(device, [tensor])
        np.testing.assert_array_equal(result, expected.reshape(tensor.shape))


@pytest.mark.parametrize("kind", TYPES)
def test_bits_a_weight(kind: GGMLQuantizationType) -> None:
    """At most half a bit a weight more than in the file, at a real width."""
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    file_bits = 8 * block_bytes / block_size
    assert 32 * QUANTIZATIONS[kind].row_words(576) / 576 <= file_bits + 0.5
