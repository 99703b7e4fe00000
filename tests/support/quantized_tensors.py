"""Tensors of every type as a GGUF holds them: random blocks, and what gguf makes of these."""

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from lora.forward.gguf.file import GGUFTensor
from lora.forward.gguf.quantization import QUANTIZATIONS

PLAIN_TYPES = (
    GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16
)  # fmt: skip


def type_name(kind: GGMLQuantizationType) -> str:
    return kind.name


def random_blocks(kind: GGMLQuantizationType, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random bytes of whole rows, f16 scales normally distributed and some zero, all finite."""
    rng = np.random.default_rng(seed)
    if kind in PLAIN_TYPES:
        values = rng.normal(size=(rows, columns)).astype(np.float32)
        values[0, 0] = 0.0
        return quants.quantize(values, kind).view(np.uint8).reshape(rows, -1)
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows, columns // block_size, block_bytes)).astype(np.uint8)
    if kind == GGMLQuantizationType.MXFP4:
        blocks[:, :, 0] = rng.integers(118, 130, blocks.shape[:2])
    else:
        offsets = QUANTIZATIONS[kind].f16_scales
        scales = rng.normal(size=(*blocks.shape[:2], len(offsets))).astype(np.float16)
        if scales[..., 0].size > 1:
            scales[0, -1] = 0.0
        set_scales(blocks, kind, scales.view(np.uint16))
    return blocks.reshape(rows, -1)


def set_scales(blocks: np.ndarray, kind: GGMLQuantizationType, bits: np.ndarray) -> None:
    for index, offset in enumerate(QUANTIZATIONS[kind].f16_scales):
        blocks[:, :, offset] = bits[:, :, index] & 255
        blocks[:, :, offset + 1] = bits[:, :, index] >> 8


def tensor_of(kind: GGMLQuantizationType, data: np.ndarray, columns: int) -> GGUFTensor:
    data = data.view()
    data.flags.writeable = False  # as the mapped file is
    return GGUFTensor(name="test", type=kind, shape=(len(data), columns), data=data)


def first_rows(tensor: GGUFTensor, rows: int) -> GGUFTensor:
    data = tensor.data[:rows]
    return GGUFTensor(tensor.name, tensor.type, (len(data), tensor.shape[1]), data)


def dequantized(tensor: GGUFTensor) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):  # of scales that are NaN
        return quants.dequantize(np.array(tensor.data), tensor.type).reshape(tensor.shape)


ALL_TYPES = list(QUANTIZATIONS)
