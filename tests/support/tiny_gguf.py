"""Whole small llama GGUFs for tests, written with llama.cpp's own writer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, TokenType

from lora.forward.gguf.quantization import quantize

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# A merge that comes first wins: "Ġthe" before "the", or "th" + "e" would leave its "Ġ" alone.
_WORDS = ("Ġthe", "Ġand", "Ġto", "Ġof", "Ġhello", "Ġworld", "user", "the", "ing", "er", "ĊĊ")


def write_tiny_llama(
    path: Path,
    *,
    n_layers: int = 2,
    hidden_size: int = 32,
    intermediate_size: int = 64,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_size: int = 8,
    vocab_size: int = 320,
    tied_head: bool = True,
    types: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Writes a llama-architecture GGUF with random weights, a byte-level BPE and ChatML.

    Args:
        path: where to.
        vocab_size: at least 287: 3 special tokens, 256 bytes, the merges, then padding tokens.
        tied_head: leaves out output.weight.
        types: tensor name's ending to "Q4_1", "Q8_0", "F16", "BF16", "F32" or any other type
            that gguf can write; the longest ending that fits wins, F32 where none does. Vectors
            stay F32 unless their ending names "norm". Quantized rows need a multiple of 32.
        metadata: keys to add or to replace; None leaves a key out.
        tensors: f32 arrays to add or to replace; None leaves a tensor out.
        seed: of the weights.

    Returns:
        name to f32 array in numpy order [rows, columns]: what the file holds, decoded.
    """
    values = {
        "general.architecture": "llama",
        "general.type": "model",
        "llama.block_count": n_layers,
        "llama.context_length": 128,
        "llama.embedding_length": hidden_size,
        "llama.feed_forward_length": intermediate_size,
        "llama.attention.head_count": n_heads,
        "llama.attention.head_count_kv": n_kv_heads,
        "llama.attention.key_length": head_size,
        "llama.attention.value_length": head_size,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": head_size,
        "llama.vocab_size": vocab_size,
        **tiny_tokenizer_metadata(vocab_size),
        **(metadata or {}),
    }
    shapes = _shapes(
        n_layers,
        hidden_size,
        intermediate_size,
        n_heads * head_size,
        n_kv_heads * head_size,
        vocab_size,
        tied_head,
    )
    weights: dict[str, np.ndarray | None] = dict(_random_weights(shapes, seed))
    weights.update(tensors or {})
    return write_gguf(path, values, weights, types or {})


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray | None],
    types: Mapping[str, str],
) -> dict[str, np.ndarray]:
    """Writes any GGUF; arguments and result as in `write_tiny_llama`."""
    # The writer demands an architecture; a test that leaves it out gets it named "none" last.
    writer = gguf.GGUFWriter(path, str(metadata.get("general.architecture") or "none"))
    if metadata.get("general.architecture") is None:
        writer.kv_data[0].clear()
    for key, value in metadata.items():
        if value is not None and key != "general.architecture":
            add_value(writer, key, value)
    written = {}
    for name, values in tensors.items():
        if values is None:
            continue
        kind = GGMLQuantizationType[_type_of(name, values.ndim, types)]
        stored = _quantized(values.astype(np.float32), kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
        written[name] = gguf.quants.dequantize(stored, kind).reshape(values.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _quantized(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """As gguf writes the type, or as lora does where gguf has no writer."""
    try:
        stored: np.ndarray = gguf.quants.quantize(values, kind)
    except NotImplementedError:
        stored = quantize(values, kind)
    return stored


def tiny_tokenizer_metadata(vocab_size: int) -> dict[str, Any]:
    """A byte-level BPE of a few merges, padded to vocab_size tokens."""
    merges: list[str] = []
    made: list[str] = []
    for word in _WORDS:
        left = word[0]
        for character in word[1:]:
            if left + character not in made:
                merges.append(f"{left} {character}")
                made.append(left + character)
            left += character
    byte_characters = sorted(_byte_characters())
    tokens = [*SPECIAL_TOKENS, *byte_characters, *made]
    kinds = [TokenType.CONTROL] * len(SPECIAL_TOKENS)
    kinds += [TokenType.NORMAL] * (len(tokens) - len(kinds))
    n_padding = vocab_size - len(tokens)
    if n_padding < 0:
        raise ValueError(f"vocab_size must be at least {len(tokens)}")
    tokens += [f"[PAD{index}]" for index in range(n_padding)]
    kinds += [TokenType.UNUSED] * n_padding
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }


def _byte_characters() -> list[str]:
    """The 256 printable characters that stand for bytes (GPT-2's encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = 256 - len(printable)
    return [chr(code) for code in [*printable, *range(256, 256 + rest)]]


def _shapes(
    n_layers: int,
    hidden_size: int,
    intermediate_size: int,
    query_size: int,
    kv_size: int,
    vocab_size: int,
    tied_head: bool,
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab_size, hidden_size)}
    for layer in range(n_layers):
        of_layer: dict[str, tuple[int, ...]] = {
            "attn_norm": (hidden_size,),
            "attn_q": (query_size, hidden_size),
            "attn_k": (kv_size, hidden_size),
            "attn_v": (kv_size, hidden_size),
            "attn_output": (hidden_size, query_size),
            "ffn_norm": (hidden_size,),
            "ffn_gate": (intermediate_size, hidden_size),
            "ffn_up": (intermediate_size, hidden_size),
            "ffn_down": (hidden_size, intermediate_size),
        }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    shapes["output_norm.weight"] = (hidden_size,)
    if not tied_head:
        shapes["output.weight"] = (vocab_size, hidden_size)
    return shapes


def _random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Matrices that keep the size of what they multiply, norms around 1."""
    random = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape, dtype=np.float32)
        norm = len(shape) == 1
        weights[name] = 1 + 0.1 * values if norm else values / np.sqrt(np.float32(shape[-1]))
    return weights


def _type_of(name: str, n_dimensions: int, types: Mapping[str, str]) -> str:
    fitting = [
        ending
        for ending in types
        if name.endswith(ending) and (n_dimensions > 1 or "norm" in ending)
    ]
    return types[max(fitting, key=len)] if fitting else "F32"


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds metadata under the type that its Python value suggests; whole numbers are u32."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
