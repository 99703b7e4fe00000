"""All that is known of each GGUF tensor type: one table, which everyone else reads.

A weight matrix keeps the bits that the file has. Its rows are repacked at load into u32 words in an
order that a kernel can read aligned (repacking.py). `shaders/wgsl/decode/{name}.wgsl` turns eight
consecutive weights of a row into f32; the matmuls do so inside their tiles, and a matrix never
exists as a whole in f32. Merging writes blocks again (block_writers.py).

Source of the block formats: ggml-common.h of ggml, and `gguf.quants`, which the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from lora.forward.gguf.block_writers import (
    write_affine,
    write_iq4_nl,
    write_iq4_xs,
    write_q2_k,
    write_q3_k,
    write_q4_k,
    write_q5_k,
    write_q6_k,
    write_scaled,
)
from lora.forward.gguf.repacking import (
    repack_iq4_xs,
    repack_mxfp4,
    repack_plain,
    repack_q2_k,
    repack_q3_k,
    repack_q4_0,
    repack_q4_1,
    repack_q4_k,
    repack_q5_0,
    repack_q5_1,
    repack_q5_k,
    repack_q6_k,
    repack_q8_0,
)

ROW_ALIGNMENT = 4  # words: rows begin on 16 bytes
_WRITTEN_AT_ONCE = 1 << 16  # weights: the arrays of a batch stay in the cache

# Bits of an exponent in the u16 of a scale (or value): all of them set mean infinity or NaN.
_F16_EXPONENT = 0x7C00
_BF16_EXPONENT = 0x7F80  # also the upper half of an f32
_E8M0_NAN = 0x00FF  # a scale of one byte: 255 is NaN, and there is no infinity


@dataclass(frozen=True)
class WholeNumbers:
    """Weights as scale · (q - zero), or scale · q - minimum, with whole numbers q of few bits.

    Products of one row with them decode no weight to a float by itself: they multiply by the q, and
    the sums by the scales (shaders/wgsl/parts/matmul_int_row_quants.wgsl, matmul_row_quants.wgsl).

    Attributes:
        bits: of q: 4 as nibbles; 5, 6 as nibbles and then the upper bits; 8 as bytes with a sign.
        zero: the q that stands for 0.
        scales: what lies after the quants: "half", an f16 for 32 weights; "halves", scale and
            minimum as f16 for 32; "six_bits", five words a super-block with six bits of scale and
            of minimum for 32; "bytes", a signed byte for 16, then an f16 a super-block.
        as_floats: whether `matmul_row` (CPU devices, Metal), too, multiplies by q, turned into
            floats; else it takes decode8.
    """

    bits: int
    zero: int
    scales: str
    as_floats: bool = True


@dataclass(frozen=True)
class Quantization:
    """One tensor type.

    Attributes:
        name: of the decode snippet, shaders/wgsl/decode/NAME.wgsl, and in lower case of the type.
        block_size: weights that share a scale, or a scale of scales.
        block_bytes: bytes of a block in the file.
        packed_bytes: bytes of a block on the device.
        group_size: weights that share a scale.
        exponents: where a block of the file can say infinity or NaN: the offset of a u16 in the
            block, and the bits of it that are all set then.
        repack: file bytes [rows, blocks, block_bytes] → the sections of the device's rows, each
            u32 [rows, words].
        write: f32 [blocks, block_size] → file bytes uint8 [blocks, block_bytes], for merging; None
            where gguf-py does it as well.
        numbers: how products of one row take the weights as whole numbers; None for types whose
            weights are none, or rare: these are decoded as everywhere else.
    """

    name: str
    block_size: int
    block_bytes: int
    packed_bytes: int
    group_size: int
    exponents: tuple[tuple[int, int], ...]
    repack: Callable[[np.ndarray], Sequence[np.ndarray]]
    write: Callable[[np.ndarray], np.ndarray] | None = None
    numbers: WholeNumbers | None = None

    @property
    def bits_a_weight(self) -> float:
        """Bits that a weight takes in the file, scales included."""
        return 8 * self.block_bytes / self.block_size

    @property
    def f16_scales(self) -> tuple[int, ...]:
        """Offsets of the f16 scales in a block; none where the weights are numbers themselves."""
        halves = [offset for offset, bits in self.exponents if bits == _F16_EXPONENT]
        return tuple(halves) if self.block_size > 1 else ()

    def row_constants(self) -> dict[str, Any]:
        """What the kernels of one row are rendered with."""
        numbers = self.numbers or WholeNumbers(0, 0, "none", as_floats=False)
        return {
            "quantization": self.name,
            "bits": numbers.bits,
            "zero": numbers.zero,
            "scales": numbers.scales,
            "as_floats": numbers.as_floats,
            "group_size": self.group_size,
        }

    def row_words(self, columns: int) -> int:
        """u32 words of one row on the device."""
        words = -(-columns * self.packed_bytes // (self.block_size * 4))
        return -(-words // ROW_ALIGNMENT) * ROW_ALIGNMENT

    def pack(self, data: np.ndarray, columns: int) -> np.ndarray:
        """File bytes of some rows as the device holds them.

        Args:
            data: uint8 [rows, columns / block_size · block_bytes].
            columns: weights a row, a multiple of block_size.

        Returns:
            uint32 [rows, row_words(columns)]; the words past the row's contents are zero.
        """
        packed = np.empty((len(data), self.row_words(columns)), np.uint32)
        filled = 0
        blocks = np.ascontiguousarray(data).reshape(len(data), -1, self.block_bytes)
        for section in self.repack(blocks):
            packed[:, filled : filled + section.shape[1]] = section
            filled += section.shape[1]
        packed[:, filled:] = 0
        return packed

    def finite_rows(self, data: np.ndarray) -> np.ndarray:
        """Which rows hold finite scales only (of F32, F16, BF16: values). Reads no quants.

        Args:
            data: uint8 [rows, bytes a row], as in the file.

        Returns:
            bool [rows].
        """
        finite = np.ones(len(data), bool)
        for offset, exponent in self.exponents:
            layout = np.dtype(
                {
                    "names": ["scale"],
                    "formats": ["<u2"],
                    "offsets": [offset],
                    "itemsize": self.block_bytes,
                }
            )
            scales = np.ascontiguousarray(data).view(layout)["scale"]
            finite &= ((scales & exponent) != exponent).all(axis=1)
        return finite


_HALF = ((0, _F16_EXPONENT),)
_TWO_HALVES = ((0, _F16_EXPONENT), (2, _F16_EXPONENT))

QUANTIZATIONS: dict[GGMLQuantizationType, Quantization] = {
    getattr(GGMLQuantizationType, quantization.name.upper()): quantization
    for quantization in (
        Quantization("f32", 1, 4, 4, 1, ((2, _BF16_EXPONENT),), repack_plain),
        Quantization("f16", 1, 2, 2, 1, _HALF, repack_plain),
        Quantization("bf16", 1, 2, 2, 1, ((0, _BF16_EXPONENT),), repack_plain),
        Quantization(
            "q8_0", 32, 34, 34, 32, _HALF, repack_q8_0,
            numbers=WholeNumbers(8, 0, "half"),
        ),
        Quantization(
            "q4_0", 32, 18, 18, 32, _HALF, repack_q4_0, write_scaled(4),
            WholeNumbers(4, 8, "half"),
        ),
        Quantization(
            "q4_1", 32, 20, 20, 32, _TWO_HALVES, repack_q4_1, write_affine(4),
            WholeNumbers(4, 0, "halves"),
        ),
        Quantization(
            "q5_0", 32, 22, 22, 32, _HALF, repack_q5_0, write_scaled(5),
            WholeNumbers(5, 16, "half", as_floats=False),
        ),
        Quantization(
            "q5_1", 32, 24, 24, 32, _TWO_HALVES, repack_q5_1, write_affine(5),
            WholeNumbers(5, 0, "halves", as_floats=False),
        ),
        Quantization("iq4_nl", 32, 18, 18, 32, _HALF, repack_q4_0, write_iq4_nl),
        Quantization("mxfp4", 32, 17, 17, 32, ((0, _E8M0_NAN),), repack_mxfp4),
        Quantization(
            "q2_k", 256, 84, 84, 16, ((80, _F16_EXPONENT), (82, _F16_EXPONENT)), repack_q2_k,
            write_q2_k,
        ),
        Quantization(
            "q3_k", 256, 110, 114, 16, ((108, _F16_EXPONENT),), repack_q3_k, write_q3_k
        ),
        Quantization(
            "q4_k", 256, 144, 148, 32, _TWO_HALVES, repack_q4_k, write_q4_k,
            WholeNumbers(4, 0, "six_bits"),
        ),
        Quantization(
            "q5_k", 256, 176, 180, 32, _TWO_HALVES, repack_q5_k, write_q5_k,
            WholeNumbers(5, 0, "six_bits"),
        ),
        Quantization(
            "q6_k", 256, 210, 210, 16, ((208, _F16_EXPONENT),), repack_q6_k, write_q6_k,
            WholeNumbers(6, 32, "bytes"),
        ),
        Quantization("iq4_xs", 256, 136, 136, 32, _HALF, repack_iq4_xs, write_iq4_xs),
    )
}  # fmt: skip


def quantize(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Rows of weights as a tensor of a type holds them.

    Args:
        values: f32 [rows, columns], finite; columns a multiple of the type's block.
        kind: one that QUANTIZATIONS lists.

    Returns:
        uint8 [rows, bytes a row].
    """
    rows, columns = values.shape
    quantization = QUANTIZATIONS[kind]
    block_size = quantization.block_size
    if columns % block_size:
        raise ValueError(f"{columns} columns are no whole blocks of {block_size} ({kind.name})")
    if quantization.write is None:
        stored: np.ndarray = gguf.quants.quantize(np.ascontiguousarray(values, np.float32), kind)
        return stored.view(np.uint8).reshape(rows, -1)
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, block_size)
    data = np.empty((len(blocks), quantization.block_bytes), np.uint8)
    n = _WRITTEN_AT_ONCE // block_size
    for start in range(0, len(blocks), n):
        data[start : start + n] = quantization.write(blocks[start : start + n])
    return data.reshape(rows, -1)
