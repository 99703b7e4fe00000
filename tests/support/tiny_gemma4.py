"""What is Gemma 4's alone in tiny_model.py: two kinds of layers, shared keys, inputs of layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tests.support.tiny_model import TinyModel


def is_local(model: TinyModel, layer: int) -> bool:
    """Whether a layer has a window."""
    return bool(model.config["layer_types"][layer] == "sliding_attention")


def first_shared(model: TinyModel) -> int:
    """The first layer that takes another's keys and values."""
    return int(model.config["num_hidden_layers"] - model.config["num_kv_shared_layers"])


def key_heads(model: TinyModel, layer: int) -> int:
    """Key and value heads of a layer."""
    c = model.config
    if c["attention_k_eq_v"] and not is_local(model, layer):
        return int(c["num_global_key_value_heads"])
    return int(c["num_key_value_heads"])


def inner_size(model: TinyModel, layer: int) -> int:
    """Width of a layer's feed-forward block."""
    c = model.config
    twice = c["use_double_wide_mlp"] and layer >= first_shared(model)
    return int(c["intermediate_size"] * (2 if twice else 1))


def gemma4_layer_shapes(model: TinyModel, layer: int) -> dict[str, tuple[int, ...]]:
    """The parameters of one layer, by their names within it."""
    c = model.config
    hidden, inner = c["hidden_size"], inner_size(model, layer)
    head = c["head_dim"] if is_local(model, layer) else c["global_head_dim"]
    queries, keys = c["num_attention_heads"] * head, key_heads(model, layer) * head
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    shapes: dict[str, tuple[int, ...]] = {f"{name}_layernorm.weight": (hidden,) for name in norms}
    shapes["self_attn.q_norm.weight"] = (head,)
    shapes["self_attn.q_proj.weight"] = (queries, hidden)
    shapes["self_attn.o_proj.weight"] = (hidden, queries)
    if layer < first_shared(model):
        shapes["self_attn.k_norm.weight"] = (head,)
        shapes["self_attn.k_proj.weight"] = (keys, hidden)
        if is_local(model, layer) or not c["attention_k_eq_v"]:
            shapes["self_attn.v_proj.weight"] = (keys, hidden)
    for name in ("gate", "up"):
        shapes[f"mlp.{name}_proj.weight"] = (inner, hidden)
    shapes["mlp.down_proj.weight"] = (hidden, inner)
    size = c["hidden_size_per_layer_input"]
    if size:
        shapes["per_layer_input_gate.weight"] = (size, hidden)
        shapes["per_layer_projection.weight"] = (hidden, size)
        shapes["post_per_layer_input_norm.weight"] = (hidden,)
    shapes["layer_scalar"] = (1,)
    return shapes


def gemma4_shapes(model: TinyModel) -> dict[str, tuple[int, ...]]:
    """The parameters outside the layers that other models don't have."""
    c = model.config
    size = c["hidden_size_per_layer_input"]
    if not size:
        return {}
    width = c["num_hidden_layers"] * size
    return {
        "model.embed_tokens_per_layer.weight": (c["vocab_size"], width),
        "model.per_layer_model_projection.weight": (width, c["hidden_size"]),
        "model.per_layer_projection_norm.weight": (size,),
    }


def gemma4_metadata(model: TinyModel) -> dict[str, Any]:
    """What the converter writes, without prefix."""
    c = model.config
    layers = range(c["num_hidden_layers"])
    widths = [inner_size(model, layer) for layer in layers]
    return {
        "feed_forward_length": widths if c["use_double_wide_mlp"] else widths[0],
        "attention.head_count_kv": [key_heads(model, layer) for layer in layers]
        if c["attention_k_eq_v"]
        else c["num_key_value_heads"],
        "attention.key_length": c["global_head_dim"],
        "attention.value_length": c["global_head_dim"],
        "attention.key_length_swa": c["head_dim"],
        "attention.value_length_swa": c["head_dim"],
        "attention.sliding_window": c["sliding_window"],
        "attention.sliding_window_pattern": [is_local(model, layer) for layer in layers],
        "attention.shared_kv_layers": c["num_kv_shared_layers"],
        "rope.freq_base_swa": c["rope_parameters"]["sliding_attention"]["rope_theta"],
        "rope.dimension_count": c["global_head_dim"],
        "rope.dimension_count_swa": c["head_dim"],
        "final_logit_softcapping": c["final_logit_softcapping"],
        "embedding_length_per_layer_input": c["hidden_size_per_layer_input"],
    }


def gemma4_divisors(model: TinyModel) -> np.ndarray:
    """Of the frequencies of layers without a window: the first quarter turns, f32 [head / 2]."""
    pairs = model.config["global_head_dim"] // 2
    return np.where(np.arange(pairs) < pairs // 4, 1.0, 1e30).astype(np.float32)
