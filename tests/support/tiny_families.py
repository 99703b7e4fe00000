"""How Hugging Face's models and llama.cpp's converter write each family, for tiny_model.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.support.tiny_gemma4 import gemma4_layer_shapes
from tests.support.tiny_qwen35 import qwen35_layer_shapes
from tests.support.tiny_recurrent import lfm2_layer_shapes

if TYPE_CHECKING:
    from tests.support.tiny_model import TinyModel

_LLAMA_NORMS = {"input_layernorm": "hidden", "post_attention_layernorm": "hidden"}
_GEMMA_NORMS = {
    **_LLAMA_NORMS,
    "pre_feedforward_layernorm": "hidden",
    "post_feedforward_layernorm": "hidden",
}
_POST_NORMS = {"post_attention_layernorm": "hidden", "post_feedforward_layernorm": "hidden"}
_HEAD_NORMS = {"self_attn.q_norm": "head", "self_attn.k_norm": "head"}


@dataclass(frozen=True)
class TinyFamily:
    """One of transformers' model types.

    Attributes:
        architecture: `general.architecture` of its GGUFs; None where it is the family's name.
        permuted: q and k rows are interleaved in the GGUF.
        norms: names of a layer's norms, with what they are as wide as.
        stored_less_one: Hugging Face stores norms less one.
        qkv_biases: q, k and v always have biases.
        fused_qkv, fused_gate_up: one module there.
        final_norm: name of the norm after the last layer.
        keys: metadata keys (without prefix) by the config's names.
    """

    architecture: str | None = None
    permuted: bool = False
    norms: dict[str, str] = field(default_factory=lambda: _LLAMA_NORMS)
    stored_less_one: bool = False
    qkv_biases: bool = False
    fused_qkv: bool = False
    fused_gate_up: bool = False
    final_norm: str = "model.norm"
    keys: dict[str, str] = field(default_factory=dict)


FAMILIES = {
    "llama": TinyFamily(permuted=True),
    "mistral": TinyFamily("llama", permuted=True),
    "smollm3": TinyFamily(permuted=True),
    "qwen2": TinyFamily(qkv_biases=True),
    "qwen3": TinyFamily(norms=_LLAMA_NORMS | _HEAD_NORMS),
    "gemma2": TinyFamily(
        norms=_GEMMA_NORMS,
        stored_less_one=True,
        keys={
            "sliding_window": "attention.sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
    ),
    "gemma3_text": TinyFamily(
        "gemma3",
        norms=_GEMMA_NORMS | _HEAD_NORMS,
        stored_less_one=True,
        keys={"sliding_window": "attention.sliding_window"},
    ),
    "gemma4_text": TinyFamily("gemma4"),
    "lfm2": TinyFamily(final_norm="model.embedding_norm"),
    "qwen3_5_text": TinyFamily("qwen35"),
    "phi3": TinyFamily(fused_qkv=True, fused_gate_up=True),
    "granite": TinyFamily(
        permuted=True,
        keys={
            "attention_multiplier": "attention.scale",
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
    ),
    "olmo2": TinyFamily(
        norms=_POST_NORMS | {"self_attn.q_norm": "queries", "self_attn.k_norm": "keys"}
    ),
    "olmo3": TinyFamily(
        "olmo2",
        norms=_POST_NORMS | {"self_attn.q_norm": "queries", "self_attn.k_norm": "keys"},
        keys={"sliding_window": "attention.sliding_window"},
    ),
    "glm4": TinyFamily(
        norms=_LLAMA_NORMS | {"post_self_attn_layernorm": "hidden", "post_mlp_layernorm": "hidden"},
        qkv_biases=True,
        fused_gate_up=True,
    ),
    "ministral3": TinyFamily("mistral3", permuted=True),
    "ernie4_5": TinyFamily(),
    "seed_oss": TinyFamily(qkv_biases=True),
    "exaone4": TinyFamily(
        norms=_POST_NORMS | _HEAD_NORMS, keys={"sliding_window": "attention.sliding_window"}
    ),
    "hunyuan_v1_dense": TinyFamily(
        "hunyuan-dense",
        norms=_LLAMA_NORMS
        | {"self_attn.query_layernorm": "head", "self_attn.key_layernorm": "head"},
    ),
}


def layer_shapes(model: TinyModel, layer: int) -> dict[str, tuple[int, ...]]:
    """The parameters of one layer, by their names within it."""
    if model.family == "gemma4_text":
        return gemma4_layer_shapes(model, layer)
    if model.family == "lfm2":
        return lfm2_layer_shapes(model, layer)
    if model.family == "qwen3_5_text":
        return qwen35_layer_shapes(model, layer)
    c, family = model.config, FAMILIES[model.family]
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    queries = c["num_attention_heads"] * model.head_dim
    keys = c["num_key_value_heads"] * model.head_dim
    widths = {"hidden": hidden, "head": model.head_dim, "queries": queries, "keys": keys}
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.weight": (widths[width],) for name, width in family.norms.items()
    }
    shapes["self_attn.o_proj.weight"] = (hidden, queries)
    shapes["mlp.down_proj.weight"] = (hidden, inner)
    if family.fused_qkv:
        shapes["self_attn.qkv_proj.weight"] = (queries + 2 * keys, hidden)
    else:
        for letter, rows in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"self_attn.{letter}_proj.weight"] = (rows, hidden)
            if family.qkv_biases or c.get("attention_bias"):
                shapes[f"self_attn.{letter}_proj.bias"] = (rows,)
    if family.fused_gate_up:
        shapes["mlp.gate_up_proj.weight"] = (2 * inner, hidden)
    else:
        shapes["mlp.gate_proj.weight"] = (inner, hidden)
        shapes["mlp.up_proj.weight"] = (inner, hidden)
        if c.get("mlp_bias"):
            shapes["mlp.gate_proj.bias"] = (inner,)
            shapes["mlp.up_proj.bias"] = (inner,)
            shapes["mlp.down_proj.bias"] = (hidden,)
    if c.get("attention_bias") and not family.qkv_biases:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    return shapes


def rope_of_family(model: TinyModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rope parameters of layers without a window, and keys for those with one."""
    rope = model.config["rope_parameters"]
    keys: dict[str, Any] = {}
    if "full_attention" not in rope:
        return rope, keys
    local = rope["sliding_attention"]["rope_theta"]
    if model.family == "gemma3_text" and local != 10000.0:
        # Files made before 2026 lack the key, and all published models have 10000.
        keys["rope.freq_base_swa"] = local
    return rope["full_attention"], keys


def llama3_divisors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """What Llama 3.1 divides each frequency by, f32 [head_dim / 2].

    Waves that fit high_freq_factor times into the original context keep their frequency, those
    that fit fewer than low_freq_factor times are slowed by factor; in between, the frequency is
    a mean of both.
    """
    pairs = np.arange(head_dim // 2)
    frequencies = rope["rope_theta"] ** (-2.0 * pairs / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2.0 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - kept) / rope["factor"] + kept)).astype(np.float32)
