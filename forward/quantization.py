"""How each GGUF tensor type lies on the device: one table.

A weight matrix keeps the bits that the file has. Its rows are repacked at load into u32 words in an
order that a kernel can read aligned: the quants of the row first, in the order of their columns,
then the scales. `shaders/wgsl/decode/{name}.wgsl` turns eight consecutive weights of a row into
f32; the matmuls do so inside their tiles, and a matrix never exists as a whole in f32.

Source of the block formats: ggml-common.h of ggml, and `gguf.quants`, which the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType

ROW_ALIGNMENT = 4  # words: rows begin on 16 bytes


@dataclass(frozen=True)
class Quantization:
    """One tensor type.

    Attributes:
        name: of the decode snippet, lower case.
        block_size: weights that share a scale.
        block_bytes: bytes of a block in the file.
        repack: file bytes [rows, bytes a row] → u32 words [rows, words a row].
    """

    name: str
    block_size: int
    block_bytes: int
    repack: Callable[[np.ndarray], np.ndarray]

    def row_words(self, columns: int) -> int:
        """u32 words of one row on the device."""
        words = -(-columns * self.block_bytes // (self.block_size * 4))
        return -(-words // ROW_ALIGNMENT) * ROW_ALIGNMENT

    def pack(self, data: np.ndarray, columns: int) -> np.ndarray:
        """File bytes of some rows as the device holds them.

        Args:
            data: uint8 [rows, columns / block_size · block_bytes].
            columns: weights a row, a multiple of block_size.

        Returns:
            uint32 [rows, row_words(columns)]; the words past the row's contents are zero.
        """
        words = self.repack(np.ascontiguousarray(data))
        padded = np.zeros((len(data), self.row_words(columns)), np.uint32)
        padded[:, : words.shape[1]] = words
        return padded


def _to_words(data: np.ndarray) -> np.ndarray:
    """uint8 [rows, n] → uint32 [rows, ceil(n / 4)], little endian."""
    rows, n_bytes = data.shape
    if n_bytes % 4:
        data = np.concatenate([data, np.zeros((rows, -n_bytes % 4), np.uint8)], axis=1)
    return np.ascontiguousarray(data).view("<u4")


def _repack_q8_0(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(len(data), -1, 34)
    scales, quants = blocks[:, :, :2], blocks[:, :, 2:]
    return np.concatenate(
        [_to_words(quants.reshape(len(data), -1)), _to_words(scales.reshape(len(data), -1))], axis=1
    )


def _consecutive_nibbles(quants: np.ndarray) -> np.ndarray:
    """ggml's nibbles [..., 16] (byte j holds weights j and j + 16) in order of the weights."""
    low, high = quants & 15, quants >> 4
    weights = np.concatenate([low, high], axis=-1)  # [..., 32]
    return weights[..., 0::2] | (weights[..., 1::2] << 4)


def _repack_q4_1(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(len(data), -1, 20)
    scales, quants = blocks[:, :, :4], _consecutive_nibbles(blocks[:, :, 4:])
    return np.concatenate(
        [_to_words(quants.reshape(len(data), -1)), _to_words(scales.reshape(len(data), -1))], axis=1
    )


QUANTIZATIONS: dict[GGMLQuantizationType, Quantization] = {
    GGMLQuantizationType.F32: Quantization("f32", 1, 4, _to_words),
    GGMLQuantizationType.F16: Quantization("f16", 1, 2, _to_words),
    GGMLQuantizationType.BF16: Quantization("bf16", 1, 2, _to_words),
    GGMLQuantizationType.Q8_0: Quantization("q8_0", 32, 34, _repack_q8_0),
    GGMLQuantizationType.Q4_1: Quantization("q4_1", 32, 20, _repack_q4_1),
}
