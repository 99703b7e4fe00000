"""The token embedding against gguf's quantization and dequantization.

Equal to the bit: F16 and BF16 are f32 values, and d · q + m rounds once (see test_quantization).
"""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from lora.forward.embedding import embedding
from lora.forward.gguf.file import GGUFTensor
from lora.forward.gguf.quantization import QUANTIZATIONS
from lora.forward.model.weights import FrozenMatrix, MatrixPart, load_matrix
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import MARKER, activation, extent_in_use, marked, run_twice, with_facts

# gguf writes these itself; the others are decoded through the embedding in test_quantization.py.
TYPES = [
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")
]
BLOCK_TYPES = [kind for kind in TYPES if QUANTIZATIONS[kind].block_size > 1]


def quantized(kind: GGMLQuantizationType, rows: int, width: int) -> tuple[GGUFTensor, np.ndarray]:
    """A tensor as a file would hold it, and what it means."""
    values = np.random.default_rng(rows).normal(size=(rows, width)).astype(np.float32)
    data = quants.quantize(values, kind).view(np.uint8).reshape(rows, -1)
    tensor = GGUFTensor(name="token_embd.weight", type=kind, shape=(rows, width), data=data)
    return tensor, quants.dequantize(data, kind).reshape(rows, width)


def look_up(
    recording: Recording, matrix: FrozenMatrix, tokens: np.ndarray, in_use: int, scale: float = 1.0
) -> np.ndarray:
    extent = extent_in_use(recording, len(tokens), in_use)
    out = marked(recording, extent, matrix.in_features)
    program = Program(recording)
    embedding(program, activation(recording, tokens, extent), matrix, extent, scale=scale, out=out)
    return run_twice(program, out)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("rows", "in_use", "width", "scale"),
    [(1, 1, 4, 1.0), (3, 2, 36, 1.0), (67, 66, 100, 24.0), (130, 130, 576, 576**0.5 / 7)],
)
def test_embedding(
    recording: Recording,
    kind: GGMLQuantizationType,
    rows: int,
    in_use: int,
    width: int,
    scale: float,
) -> None:
    if kind in BLOCK_TYPES:
        width = -(-width // 32) * 32
    tensor, table = quantized(kind, 50, width)
    tokens = np.random.default_rng(rows).integers(0, 50, rows)
    tokens[0], tokens[-1] = 49, 0  # both ends; 130 tokens of 50 repeat
    result = look_up(recording, load_matrix(recording, [tensor]), tokens, in_use, scale)
    expected = table[tokens] * np.float32(scale)
    # Exact without a scale; with one, a compiler may take q · (d · scale): an ulp or two.
    np.testing.assert_allclose(
        result[:in_use], expected[:in_use], rtol=0 if scale == 1 else 2.4e-7, atol=0
    )
    assert (result[in_use:] == MARKER).all()


@pytest.mark.parametrize("kind", TYPES)
def test_parts_by_the_largest_binding(recording: Recording, kind: GGMLQuantizationType) -> None:
    tensor, table = quantized(kind, 300, 32)
    most = 4 * 130 * QUANTIZATIONS[kind].row_words(32)
    matrix = load_matrix(with_facts(recording, max_binding=most), [tensor])
    parts = [(part.first_feature, part.out_features) for part in matrix.parts]
    assert parts == [(0, 128), (128, 128), (256, 44)]
    # The first and last row of every part, then all of them in disorder.
    tokens = np.concatenate(
        [[0, 127, 128, 255, 256, 299], np.random.default_rng(0).permutation(300)]
    )
    np.testing.assert_array_equal(look_up(recording, matrix, tokens, len(tokens)), table[tokens])


def test_a_width_of_no_whole_vectors_is_refused(recording: Recording) -> None:
    words = recording.memory.empty((2, 8), "u32")
    part = MatrixPart(QUANTIZATIONS[GGMLQuantizationType.F32], words, 0)
    extent = recording.memory.extent(2)
    tokens = recording.memory.empty((2,), "u32", extent=extent)
    with pytest.raises(ValueError, match="no multiple of 4"):
        embedding(Program(recording), tokens, FrozenMatrix(2, 6, (part,)), extent)
