"""What is LFM2's alone in tiny_model.py: layers of short convolutions among those of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.support.tiny_model import TinyModel


def is_convolution(model: TinyModel, layer: int) -> bool:
    """Whether a layer is a short convolution."""
    return bool(model.config["layer_types"][layer] == "conv")


def lfm2_layer_shapes(model: TinyModel, layer: int) -> dict[str, tuple[int, ...]]:
    """The parameters of one layer, by their names within it."""
    c = model.config
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "operator_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
        "feed_forward.w1.weight": (inner, hidden),
        "feed_forward.w3.weight": (inner, hidden),
        "feed_forward.w2.weight": (hidden, inner),
    }
    if is_convolution(model, layer):
        return shapes | {
            "conv.in_proj.weight": (3 * hidden, hidden),
            "conv.conv.weight": (hidden, 1, c["conv_L_cache"]),
            "conv.out_proj.weight": (hidden, hidden),
        }
    queries, keys = (c[f"num_{of}_heads"] * model.head_dim for of in ("attention", "key_value"))
    return shapes | {
        "self_attn.q_layernorm.weight": (model.head_dim,),
        "self_attn.k_layernorm.weight": (model.head_dim,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.out_proj.weight": (hidden, queries),
    }


def lfm2_metadata(model: TinyModel) -> dict[str, Any]:
    """What the converter writes, without prefix."""
    c = model.config
    return {
        "attention.head_count_kv": [
            0 if is_convolution(model, layer) else c["num_key_value_heads"]
            for layer in range(c["num_hidden_layers"])
        ],
        "shortconv.l_cache": c["conv_L_cache"],
        "vocab_size": c["vocab_size"],
    }
