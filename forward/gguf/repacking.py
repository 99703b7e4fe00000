"""From the blocks of a GGUF tensor to the rows of a matrix on the device, one function a layout.

A function takes file bytes [rows, blocks, block_bytes] and returns the sections of the device's
rows, each u32 [rows, words]: the quants in the order of their columns, then the scales.

Bits of quants are laid out so that four weights are decoded at once: eight weights (an "eight")
have theirs in the four bytes of a word, weight j in byte j and weight 4 + j in the bits above it.
So four bits of an eight are one word, two bits are a word for two eights, one bit a word for four.

Source of the block formats: ggml-common.h of ggml, and `gguf.quants`, which the tests compare with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def _words(blocks: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The bytes start … stop of every block as u32.  # [rows, blocks, (stop - start) / 4]"""
    return np.ascontiguousarray(blocks[:, :, start:stop]).view("<u4")


def _row(words: np.ndarray) -> np.ndarray:
    """Words of blocks as a section of rows.  # [rows, words]"""
    return words.reshape(len(words), -1)


def _packed_row(pieces: np.ndarray) -> np.ndarray:
    """u8 or u16 of blocks [rows, …], two or four a word, the last word filled with zeros."""
    data = np.ascontiguousarray(pieces).view(np.uint8).reshape(len(pieces), -1)
    if data.shape[1] % 4:
        padding = np.zeros((len(data), -data.shape[1] % 4), np.uint8)
        data = np.concatenate([data, padding], axis=1)
    return data.view("<u4")


def _byte_mask(bits: int) -> np.uint32:
    return np.uint32(bits * 0x01010101)


def _four_bits(words: np.ndarray) -> np.ndarray:
    """Nibbles of chunks of n bytes as words of eights.

    Args:
        words: u32 [..., n / 4]. Byte l holds weights l (lower nibble) and n + l.

    Returns:
        u32 [..., n / 4], a word for each eight of the chunk's 2n weights.
    """
    low, even, odd = _byte_mask(0x0F), words[..., 0::2], words[..., 1::2]
    return np.concatenate(
        [
            (even & low) | ((odd & low) << 4),
            ((even >> 4) & low) | (odd & ~low),
        ],
        axis=-1,
    )


def _transpose_fields(words: np.ndarray, bits: int) -> None:
    """Exchanges, in each byte, field s of word f with field f of word s; in place.

    Args:
        words: u32 [n, …]; the bytes hold n = 8 / bits fields.
    """
    n = 8 // bits
    step = 1
    while step < n:  # as for any matrix of 2^i rows: the off-diagonal halves change places
        lower = [s for s in range(n) if not s & step]
        mask, shift = _byte_mask(sum((2**bits - 1) << (bits * s) for s in lower)), bits * step
        for f in lower:
            first, second = words[f], words[f + step]
            exchanged = ((first >> shift) ^ second) & mask
            second ^= exchanged
            first ^= exchanged << shift
        step *= 2


def _two_bits(words: np.ndarray) -> np.ndarray:
    """Two-bit quants of super-blocks as words of sixteen weights, the first eight in lower bits.

    Args:
        words: u32 [rows, blocks, 16], two chunks of 32 bytes. Bits 2s of byte l hold weight
            32 s + l of the chunk's 128.

    Returns:
        u32 [rows, blocks, 16].
    """
    # Blocks last, so that numpy's inner loop is long: five times faster.
    columns = words.reshape(-1, 16).T.copy(order="C")  # `words` may be the file itself
    chunks = columns.reshape(2, 2, 4, -1)  # [chunk, half of its 32 bytes, four of them, blocks]
    _transpose_fields(np.moveaxis(chunks, 2, 0), 2)
    return np.ascontiguousarray(chunks.transpose(3, 0, 2, 1)).reshape(words.shape)


def _one_bit(words: np.ndarray) -> np.ndarray:
    """Single bits of super-blocks as words of 32 weights, the first eight in the lowest bits.

    Args:
        words: u32 [rows, blocks, 8]. Bit s of byte l holds weight 32 s + l.

    Returns:
        u32 [rows, blocks, 8].
    """
    columns = words.reshape(-1, 8).T.copy(order="C")
    _transpose_fields(columns, 1)
    return np.ascontiguousarray(columns.T).reshape(words.shape)


def _bits_of_bytes() -> np.ndarray:
    """For every byte the word in which its bit i is bit i / 4 of byte i % 4.  # u32 [256]"""
    byte = np.arange(256, dtype=np.uint32)
    moved = np.zeros(256, np.uint32)
    for i in range(8):
        moved |= ((byte >> i) & 1) << (8 * (i % 4) + i // 4)
    return moved


_BITS_OF_BYTES = _bits_of_bytes()


def _fifth_bits(blocks: np.ndarray, start: int) -> np.ndarray:
    """The fifth bits of blocks of 32 (bit i of a u32 at `start` is weight i), as `_one_bit`."""
    bits = np.zeros(blocks.shape[:2], np.uint32)
    for eight in range(4):
        bits |= _BITS_OF_BYTES[blocks[:, :, start + eight]] << (2 * eight)
    return bits


def _scales_and_minima(blocks: np.ndarray) -> np.ndarray:
    """The six-bit scales and minima of Q4_K and Q5_K, as bytes.

    Returns:
        u32 [rows, blocks, 4]: a word holds scale, minimum, scale, minimum of two sub-blocks.
    """
    scale, minimum, rest = np.moveaxis(_words(blocks, 4, 16), -1, 0)
    six, four, two = _byte_mask(0x3F), _byte_mask(0x0F), _byte_mask(0x30)
    scales = np.stack([scale & six, (rest & four) | ((scale >> 2) & two)], axis=-1)
    minima = np.stack([minimum & six, ((rest >> 4) & four) | ((minimum >> 2) & two)], axis=-1)
    pairs = np.stack([scales.view(np.uint8), minima.view(np.uint8)], axis=-1)
    return pairs.reshape(*blocks.shape[:2], 16).view("<u4")


def _six_bit_scales(blocks: np.ndarray, start: int) -> np.ndarray:
    """Q3_K's sixteen six-bit scales as bytes.

    The file has three words: the lower nibbles of the first two are the lower bits of scales
    0 … 7, the upper nibbles those of scales 8 … 15; bits 2i of the third word's byte j are the
    upper two of scale 4i + j.

    Returns:
        u32 [rows, blocks, 4].
    """
    first, second, upper = np.moveaxis(_words(blocks, start, start + 12), -1, 0)
    four, two = _byte_mask(0x0F), _byte_mask(0x30)
    return np.stack(
        [
            (first & four) | ((upper << 4) & two),
            (second & four) | ((upper << 2) & two),
            ((first >> 4) & four) | (upper & two),
            ((second >> 4) & four) | ((upper >> 2) & two),
        ],
        axis=-1,
    )


# -- one function a layout -------------------------------------------------------------------------


def repack_plain(blocks: np.ndarray) -> Sequence[np.ndarray]:
    return [_packed_row(blocks)]


def repack_q8_0(blocks: np.ndarray) -> Sequence[np.ndarray]:
    return [_row(_words(blocks, 2, 34)), _packed_row(blocks[:, :, :2])]


def repack_q4_0(blocks: np.ndarray) -> Sequence[np.ndarray]:
    return [_row(_four_bits(_words(blocks, 2, 18))), _packed_row(blocks[:, :, :2])]


def repack_q4_1(blocks: np.ndarray) -> Sequence[np.ndarray]:
    return [_row(_four_bits(_words(blocks, 4, 20))), _row(_words(blocks, 0, 4))]


def repack_q5_0(blocks: np.ndarray) -> Sequence[np.ndarray]:
    return [
        _row(_four_bits(_words(blocks, 6, 22))),
        _fifth_bits(blocks, 2),
        _packed_row(blocks[:, :, :2]),
    ]


def repack_q5_1(blocks: np.ndarray) -> Sequence[np.ndarray]:
    return [
        _row(_four_bits(_words(blocks, 8, 24))),
        _fifth_bits(blocks, 4),
        _row(_words(blocks, 0, 4)),
    ]


def repack_mxfp4(blocks: np.ndarray) -> Sequence[np.ndarray]:
    return [_row(_four_bits(_words(blocks, 1, 17))), _packed_row(blocks[:, :, :1])]


def repack_q2_k(blocks: np.ndarray) -> Sequence[np.ndarray]:
    scales = np.concatenate([_words(blocks, 80, 84), _words(blocks, 0, 16)], axis=-1)
    return [_row(_two_bits(_words(blocks, 16, 80))), _row(scales)]


def repack_q3_k(blocks: np.ndarray) -> Sequence[np.ndarray]:
    return [
        _row(_two_bits(_words(blocks, 32, 96))),
        _row(_one_bit(_words(blocks, 0, 32))),
        _row(_six_bit_scales(blocks, 96)),
        _packed_row(blocks[:, :, 108:110]),
    ]


def _four_bits_of_pairs(words: np.ndarray) -> np.ndarray:
    """The nibbles of Q4_K and Q5_K: chunks of 32 bytes, which hold two sub-blocks."""
    return _four_bits(words.reshape(len(words), -1, 8))


def repack_q4_k(blocks: np.ndarray) -> Sequence[np.ndarray]:
    scales = np.concatenate([_words(blocks, 0, 4), _scales_and_minima(blocks)], axis=-1)
    return [_row(_four_bits_of_pairs(_words(blocks, 16, 144))), _row(scales)]


def repack_q5_k(blocks: np.ndarray) -> Sequence[np.ndarray]:
    scales = np.concatenate([_words(blocks, 0, 4), _scales_and_minima(blocks)], axis=-1)
    return [
        _row(_four_bits_of_pairs(_words(blocks, 48, 176))),
        _row(_one_bit(_words(blocks, 16, 48))),
        _row(scales),
    ]


def repack_q6_k(blocks: np.ndarray) -> Sequence[np.ndarray]:
    halves = _words(blocks, 0, 128).reshape(len(blocks), -1, 16)  # chunks of 64 bytes
    return [
        _row(_four_bits(halves)),
        _row(_two_bits(_words(blocks, 128, 192))),
        _row(_words(blocks, 192, 208)),
        _packed_row(blocks[:, :, 208:210]),
    ]


def repack_iq4_xs(blocks: np.ndarray) -> Sequence[np.ndarray]:
    quants = _words(blocks, 8, 136).reshape(len(blocks), -1, 4)  # chunks of 16 bytes
    return [_row(_four_bits(quants)), _row(_words(blocks, 0, 8))]
