"""Every tensor type on the device against gguf's own dequantization, through the embedding.

Equal to the bit: every product of scales and quants is exact in f32 (d has 11 significant bits, and
what it is multiplied with at most 12: s · q has 7 + 5 in Q6_K, 5 + 7 in IQ4_XS); adding m or
- dmin · m, itself exact, rounds once, fused or not. Only what is no normal f32, below 2^-126, may
a device take for zero: MXFP4's smallest scales reach there.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from lora.forward.embedding import embedding
from lora.forward.gguf.file import GGUFFile, GGUFTensor
from lora.forward.gguf.quantization import QUANTIZATIONS
from lora.forward.model.weights import FrozenMatrix, load_matrix
from lora.shaders.errors import InputError
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import MARKER, activation, extent_in_use, marked, run_twice
from tests.support.quantized_tensors import (
    ALL_TYPES,
    PLAIN_TYPES,
    dequantized,
    first_rows,
    random_blocks,
    set_scales,
    tensor_of,
    type_name,
)

TYPES = [kind for kind in ALL_TYPES if QUANTIZATIONS[kind].block_size <= 32]  # fit 32 columns
BLOCK_TYPES = [kind for kind in ALL_TYPES if kind not in PLAIN_TYPES]
SMALLEST_NORMAL = np.float32(2.0**-126)


def blocks_of_all_scales(kind: GGMLQuantizationType, seed: int = 0) -> np.ndarray:
    """Random bytes, scales of every kind of finite number: huge, subnormal, zero, negative."""
    rng = np.random.default_rng(seed)
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    rows, n_blocks = 37, 7  # 259 blocks
    blocks = rng.integers(0, 256, (rows, n_blocks, block_bytes)).astype(np.uint8)
    if kind == GGMLQuantizationType.MXFP4:
        # From 253 on a weight of the file itself can be infinite: 2^(253 - 128) · 12.
        blocks[:, :, 0] = (np.arange(rows * n_blocks) % 253).reshape(rows, n_blocks)
    else:
        n_scales = len(QUANTIZATIONS[kind].f16_scales)
        bits = rng.integers(0, 1 << 16, (rows, n_blocks, n_scales), np.uint16)
        infinite = (bits & 0x7C00) == 0x7C00
        bits[infinite] ^= 0x4000
        ends = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x83FF, 0x0400, 0x7BFF, 0xFBFF]
        bits.reshape(-1, bits.shape[2])[: len(ends)] = np.array(ends, np.uint16)[:, None]
        set_scales(blocks, kind, bits)
    return blocks.reshape(rows, -1)


def decode_on_device(recording: Recording, matrix: FrozenMatrix, rows: int) -> np.ndarray:
    """The first rows of a matrix, looked up as embeddings."""
    extent = extent_in_use(recording, rows + 2, rows)
    tokens = np.concatenate([np.arange(rows), [0, 0]])
    out = marked(recording, extent, matrix.in_features)
    program = Program(recording)
    embedding(program, activation(recording, tokens, extent), matrix, extent, out=out)
    result = run_twice(program, out)
    assert (result[-2:] == MARKER).all()
    return result[:-2]


def check(recording: Recording, tensor: GGUFTensor) -> None:
    """A tensor on the device is what gguf says, to the bit."""
    expected = dequantized(tensor)
    assert np.isfinite(expected).all()
    assert len(np.unique(expected)) > 1
    result = decode_on_device(recording, load_matrix(recording, [tensor]), tensor.shape[0])
    if tensor.type == GGMLQuantizationType.MXFP4:
        flushed = (np.abs(expected) < SMALLEST_NORMAL) & (result == 0)
        expected = np.where(flushed, 0, expected)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("kind", ALL_TYPES, ids=type_name)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (130, 9)])
def test_random_blocks(
    recording: Recording, kind: GGMLQuantizationType, rows: int, blocks: int
) -> None:  # one block or nine; or 4 or 260 columns
    block_size = QUANTIZATIONS[kind].block_size
    columns = 32 * blocks - 28 if block_size == 1 else block_size * blocks
    check(recording, tensor_of(kind, random_blocks(kind, rows, columns, rows), columns))


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=type_name)
def test_all_scales(recording: Recording, kind: GGMLQuantizationType) -> None:
    """Blocks of nearly equal weights have scales below f16's normal numbers (6.1e-5)."""
    data = blocks_of_all_scales(kind)
    check(recording, tensor_of(kind, data, 7 * QUANTIZATIONS[kind].block_size))


def test_mxfp4_below_the_normal_numbers(recording: Recording) -> None:
    """The two scales that are no normal f32, with products that are: 2^-128 · 4, 2^-127 · 12, …"""
    data = random_blocks(GGMLQuantizationType.MXFP4, 4, 128).reshape(4, 4, 17)
    data[:, :, 0] = [0, 1, 2, 3]
    tensor = tensor_of(GGMLQuantizationType.MXFP4, data.reshape(4, -1), 128)
    below_two = np.abs(dequantized(tensor))[:, :64]
    assert (below_two >= SMALLEST_NORMAL).any()
    check(recording, tensor)


@pytest.mark.parametrize("kind", ALL_TYPES, ids=type_name)
def test_split_by_the_largest_binding(
    recording: Recording, kind: GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """152 rows in parts of 64: what a tensor larger than one binding becomes."""
    columns = max(32, QUANTIZATIONS[kind].block_size)
    row_bytes = 4 * QUANTIZATIONS[kind].row_words(columns)
    tensor = tensor_of(kind, random_blocks(kind, 152, columns), columns)
    with monkeypatch.context() as patch:
        patch.setattr("lora.forward.model.weights.CPU_PART_BYTES", 100 * row_bytes)
        patch.setattr("lora.forward.model.weights.MAX_PART_BYTES", 100 * row_bytes)
        # Pieces of an upload that end within parts.
        patch.setattr("lora.forward.model.weights.UPLOAD_PIECE", 50 * row_bytes)
        matrix = load_matrix(recording, [tensor])
    assert [(part.first_feature, part.out_features) for part in matrix.parts] == [
        (0, 64),
        (64, 64),
        (128, 24),
    ]
    np.testing.assert_array_equal(decode_on_device(recording, matrix, 152), dequantized(tensor))


@pytest.mark.parametrize(
    ("first", "second"),
    [("Q4_1", "Q8_0"), ("Q5_0", "MXFP4"), ("Q4_K", "Q6_K"), ("IQ4_XS", "IQ4_NL"), ("Q3_K", "F16")],
)
def test_a_stack_of_two_types(recording: Recording, first: str, second: str) -> None:
    tensors = []
    for index, name in enumerate((first, second)):
        kind = GGMLQuantizationType[name]
        tensors.append(tensor_of(kind, random_blocks(kind, 20 + 4 * index, 512, index), 512))
    expected = np.concatenate([dequantized(tensor) for tensor in tensors])
    result = decode_on_device(recording, load_matrix(recording, tensors), 44)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        (kind, columns)
        for kind in ALL_TYPES
        for columns in (576, 640, 1024, 2048, 8192)
        if columns % QUANTIZATIONS[kind].block_size == 0
    ],
)
def test_bits_a_weight(kind: GGMLQuantizationType, columns: int) -> None:
    """At most half a bit a weight more than in the file, at real widths; never less."""
    file_bits = QUANTIZATIONS[kind].bits_a_weight
    assert file_bits <= 32 * QUANTIZATIONS[kind].row_words(columns) / columns <= file_bits + 0.5


@pytest.mark.parametrize("kind", ALL_TYPES, ids=type_name)
def test_sizes_of_blocks(kind: GGMLQuantizationType) -> None:
    quantization = QUANTIZATIONS[kind]
    assert (quantization.block_size, quantization.block_bytes) == GGML_QUANT_SIZES[kind]


# -- NaN and infinity --------------------------------------------------------------------------


def non_finite_places() -> Iterator[tuple[GGMLQuantizationType, int, bytes]]:
    """(type, offset in a block, bytes): every scale with infinity, -infinity, and NaNs."""
    for kind, quantization in QUANTIZATIONS.items():
        for offset in quantization.f16_scales:
            for bits in (0x7C00, 0xFC00, 0x7C01, 0xFFFF):
                yield kind, offset, bits.to_bytes(2, "little")
    yield GGMLQuantizationType.MXFP4, 0, b"\xff"
    for value in (np.inf, -np.inf, np.nan):
        for kind, dtype in (
            (GGMLQuantizationType.F32, "<f4"), (GGMLQuantizationType.F16, "<f2")
        ):  # fmt: skip
            yield kind, 0, np.array(value, dtype).tobytes()
        yield GGMLQuantizationType.BF16, 0, np.array(value, "<f4").tobytes()[2:]
    yield GGMLQuantizationType.F32, 0, 0x7F800001.to_bytes(4, "little")  # its upper half: infinity
    yield GGMLQuantizationType.BF16, 0, 0xFF81.to_bytes(2, "little")


def test_every_type_is_in_the_test_of_non_finite_numbers() -> None:
    assert {kind for kind, _, _ in non_finite_places()} == set(ALL_TYPES)


@pytest.mark.parametrize(
    ("kind", "offset", "bits"),
    [
        pytest.param(*place, id=f"{place[0].name}-{place[1]}-{place[2].hex()}")
        for place in non_finite_places()
    ],
)
def test_non_finite_numbers_are_refused(
    recording: Recording,
    kind: GGMLQuantizationType,
    offset: int,
    bits: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the last block of row 9, in the second of the pieces of an upload."""
    columns = 3 * max(32, QUANTIZATIONS[kind].block_size)
    row_bytes = 4 * QUANTIZATIONS[kind].row_words(columns)
    monkeypatch.setattr("lora.forward.model.weights.UPLOAD_PIECE", 6 * row_bytes)
    data = random_blocks(kind, 12, columns)
    end = data.shape[1] - GGML_QUANT_SIZES[kind][1] + offset
    data[9, end : end + len(bits)] = np.frombuffer(bits, np.uint8)
    assert not np.isfinite(dequantized(tensor_of(kind, data, columns))[9]).all() or (
        kind == GGMLQuantizationType.MXFP4  # gguf makes 2^127 of the NaN
    )
    finite = QUANTIZATIONS[kind].finite_rows(data)
    np.testing.assert_array_equal(finite, np.arange(12) != 9)
    number = "weight" if kind in PLAIN_TYPES else "scale"
    with pytest.raises(
        InputError, match=f"Row 9 of the tensor 'test' \\({kind.name}\\) has a {number}"
    ):
        load_matrix(recording, [tensor_of(kind, data, columns)])


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=type_name)
def test_all_finite_scales_are_accepted(kind: GGMLQuantizationType) -> None:
    """Quants that look like infinities, and scales up to the largest."""
    data = blocks_of_all_scales(kind)
    assert QUANTIZATIONS[kind].finite_rows(data).all()


@pytest.mark.parametrize("kind", PLAIN_TYPES, ids=type_name)
def test_the_largest_finite_weights_are_accepted(kind: GGMLQuantizationType) -> None:
    largest = {"F32": 0x7F7FFFFF, "F16": 0x7BFF, "BF16": 0x7F7F}[kind.name]
    size = GGML_QUANT_SIZES[kind][1]
    data = np.frombuffer(largest.to_bytes(size, "little") * 4, np.uint8).reshape(1, -1)
    assert QUANTIZATIONS[kind].finite_rows(data).all()


# -- real tensors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["blk.7.attn_q.weight", "blk.29.ffn_down.weight", "token_embd.weight"]
)
def test_real_tensors(recording: Recording, smollm2: Path, name: str) -> None:
    check(recording, first_rows(GGUFFile(smollm2).tensors[name], 700))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("token_embd.weight", "Q8_0"),
        ("blk.0.ffn_gate.weight", "Q5_0"),
        ("blk.0.attn_output.weight", "Q4_K"),
        ("blk.0.ffn_down.weight", "Q6_K"),
    ],
)
def test_real_tensors_of_a_mixed_file(
    recording: Recording, gemma3: Path, name: str, kind: str
) -> None:
    tensor = GGUFFile(gemma3).tensors[name]
    assert tensor.type.name == kind
    check(recording, first_rows(tensor, 700))
