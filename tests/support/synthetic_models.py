"""GGUFs of real models' shapes and tensor types with random weights, where there are no files.

Weights of a matrix [out, in] have a standard deviation of about 1 / sqrt(in), norms are near one:
a step computes ordinary numbers. Quantized tensors are random quants under constant scales, since
gguf-py writes no K-quants.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from lora.forward.gguf.quantization import QUANTIZATIONS
from tests.support.synthetic_gemma4 import Gemma4Shape
from tests.support.synthetic_recurrent import Lfm2Shape, Qwen35Shape
from tests.support.synthetic_shape import Shape
from tests.support.tiny_gguf import add_value, tiny_tokenizer_metadata

_GEMMA4_TYPES = {
    "weight": "Q4_K", "token_embd.weight": "Q6_K", "ffn_down.weight": "Q6_K",
    "per_layer_model_proj.weight": "Q8_0",
}  # fmt: skip

_QWEN35_TYPES = {
    "weight": "Q4_K", "token_embd.weight": "Q6_K", "ffn_down.weight": "Q6_K",
    "ssm_alpha.weight": "Q8_0", "ssm_beta.weight": "Q8_0",
}  # fmt: skip

SHAPES: dict[str, Shape] = {
    "SmolLM2-135M": Shape(
        "llama", 30, 576, 1536, 9, 3, 64, 49152,
        {"weight": "Q4_1", "token_embd.weight": "Q8_0"},
    ),
    "Gemma-3-270M": Shape(
        "gemma3", 18, 640, 2048, 4, 1, 256, 262144,
        {"weight": "Q5_0", "token_embd.weight": "Q8_0", "ffn_down.weight": "Q6_K"},
        {"attention.sliding_window": 512, "rope.freq_base": 1e6},
    ),
    "Llama-1.2B": Shape(
        "llama", 16, 2048, 8192, 32, 8, 64, 128256,
        {"weight": "Q4_K", "token_embd.weight": "Q6_K", "ffn_down.weight": "Q6_K"},
        {"rope.freq_base": 500000.0},
    ),
    "Llama-8B": Shape(
        "llama", 32, 4096, 14336, 32, 8, 128, 128256,
        {"weight": "Q4_K", "ffn_down.weight": "Q6_K", "output.weight": "Q6_K"},
        {"rope.freq_base": 500000.0}, tied_head=False,
    ),
    "Gemma-4-E2B": Gemma4Shape("gemma4", 35, 1536, 6144, 8, 1, 256, 262144, _GEMMA4_TYPES),
    "Gemma-4-E4B": Gemma4Shape(
        "gemma4", 42, 2560, 10240, 8, 2, 256, 262144, _GEMMA4_TYPES,
        every=6, n_shared=18, wide=False,
    ),
    "Ministral-3-3B": Shape(
        "mistral3", 26, 3072, 9216, 32, 8, 128, 131072,
        {"weight": "Q4_K", "token_embd.weight": "Q6_K", "ffn_down.weight": "Q6_K"},
        {
            "rope.freq_base": 1e6, "rope.scaling.type": "yarn", "rope.scaling.factor": 16.0,
            "rope.scaling.original_context_length": 16384,
            "rope.scaling.yarn_log_multiplier": 1.0, "attention.temperature_scale": 0.1,
        },
    ),
    "LFM2-1.2B": Lfm2Shape(
        "lfm2", 16, 2048, 8192, 32, 8, 64, 65536,
        {"weight": "Q4_K", "token_embd.weight": "Q6_K", "ffn_down.weight": "Q6_K"},
        attention=(2, 5, 8, 10, 12, 14),
    ),
    "Qwen3.5-0.8B": Qwen35Shape("qwen35", 24, 1024, 3584, 8, 2, 256, 248320, _QWEN35_TYPES),
    "Qwen3.5-9B": Qwen35Shape(
        "qwen35", 32, 4096, 12288, 16, 4, 256, 248320, _QWEN35_TYPES | {"output.weight": "Q6_K"},
        tied_head=False, value_heads=32,
    ),
    "tiny-lfm2": Lfm2Shape(
        "lfm2", 4, 256, 512, 4, 2, 64, 512,
        {"weight": "Q4_K", "token_embd.weight": "Q6_K"}, attention=(2,),
    ),
    "tiny-qwen35": Qwen35Shape(
        "qwen35", 4, 256, 512, 4, 2, 64, 512, _QWEN35_TYPES, key_heads=2, value_heads=4,
        delta_size=64,
    ),
    "tiny-gemma-4": Gemma4Shape(
        "gemma4", 6, 256, 512, 4, 1, 64, 512, _GEMMA4_TYPES,
        every=3, n_shared=3, global_head_size=128,
    ),
    "tiny": Shape(
        "llama", 2, 256, 512, 4, 2, 64, 512, {"weight": "Q4_K", "token_embd.weight": "Q6_K"}
    ),
}  # fmt: skip


def write_model(path: Path, shape: Shape, seed: int = 0) -> None:
    """Writes a shape's GGUF, tensor by tensor."""
    writer = gguf.GGUFWriter(path, shape.architecture)
    prefix = shape.architecture
    values: dict[str, Any] = {
        f"{prefix}.block_count": shape.n_layers,
        f"{prefix}.context_length": 32768,
        f"{prefix}.embedding_length": shape.hidden_size,
        f"{prefix}.feed_forward_length": shape.intermediate_size,
        f"{prefix}.attention.head_count": shape.n_heads,
        f"{prefix}.attention.head_count_kv": shape.n_kv_heads,
        f"{prefix}.attention.key_length": shape.head_size,
        f"{prefix}.attention.value_length": shape.head_size,
        f"{prefix}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{prefix}.vocab_size": shape.vocab_size,
        **{f"{prefix}.{key}": value for key, value in shape.own_metadata().items()},
        **tiny_tokenizer_metadata(min(shape.vocab_size, 512)),
    }
    if prefix == "llama":
        values["llama.rope.dimension_count"] = shape.head_size
    for key, value in values.items():
        add_value(writer, key, value)
    rng = np.random.default_rng(seed)
    for name, sizes in shape.tensors().items():
        kind = shape.type_of(name)
        if kind == Type.F32:
            writer.add_tensor(name, shape.values(name, sizes, rng))
        else:
            writer.add_tensor(name, _random_blocks(rng, kind, *sizes), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _random_blocks(rng: np.random.Generator, kind: Type, rows: int, columns: int) -> np.ndarray:
    """Bytes of a matrix: random quants, scales such that the weights' mean is about zero."""
    quantization = QUANTIZATIONS[kind]
    block_size, block_bytes = quantization.block_size, quantization.block_bytes
    data = rng.bytes(rows * columns // block_size * block_bytes)
    blocks = np.frombuffer(data, np.uint8).reshape(rows, columns // block_size, block_bytes).copy()
    std = columns**-0.5

    def put(*scales: float) -> None:
        for at, value in zip(quantization.f16_scales, scales, strict=True):
            blocks[:, :, at : at + 2] = np.array([value], np.float16).view(np.uint8)

    if kind == Type.Q8_0:
        put(std / 74)  # quants of -128 … 127
    elif kind == Type.Q5_0:
        put(std / 9.2)  # -16 … 15
    elif kind == Type.Q4_1:
        put(std / 4.6, -7.5 * std / 4.6)  # 0 … 15
    elif kind == Type.Q4_K:
        # d · 32 · q - dmin · 32 with every six-bit scale and minimum 32.
        put(std / 4.6 / 32, 7.5 * std / 4.6 / 32)
        blocks[:, :, 4:12] = 0b10_100000  # upper bits of scales 4 … 7 in bits 6 and 7, 32 below
        blocks[:, :, 12:16] = 0
    elif kind == Type.Q6_K:
        blocks[:, :, 192:208] = 32
        put(std / 18.5 / 32)  # -32 … 31
    else:
        raise ValueError(f"no random blocks of {kind.name}")
    return blocks.reshape(rows, -1)
