"""What is Qwen3.5's alone in tiny_model.py: gated DeltaNets among layers of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tests.support.tiny_model import TinyModel


def is_delta_net(model: TinyModel, layer: int) -> bool:
    """Whether a layer is a gated DeltaNet."""
    return bool(model.config["layer_types"][layer] == "linear_attention")


def _sizes(model: TinyModel) -> tuple[int, int, int]:
    """Key heads, value heads, and numbers in a head."""
    c = model.config
    return c["linear_num_key_heads"], c["linear_num_value_heads"], c["linear_key_head_dim"]


def qwen35_layer_shapes(model: TinyModel, layer: int) -> dict[str, tuple[int, ...]]:
    """The parameters of one layer, by their names within it."""
    c = model.config
    hidden, inner, head = c["hidden_size"], c["intermediate_size"], model.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if not is_delta_net(model, layer):
        queries, keys = (c[f"num_{of}_heads"] * head for of in ("attention", "key_value"))
        return shapes | {
            "self_attn.q_norm.weight": (head,),
            "self_attn.k_norm.weight": (head,),
            "self_attn.q_proj.weight": (2 * queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
        }
    keys, values, size = _sizes(model)
    width = (2 * keys + values) * size
    return shapes | {
        "linear_attn.in_proj_qkv.weight": (width, hidden),
        "linear_attn.in_proj_z.weight": (values * size, hidden),
        "linear_attn.in_proj_b.weight": (values, hidden),
        "linear_attn.in_proj_a.weight": (values, hidden),
        "linear_attn.conv1d.weight": (width, 1, c["linear_conv_kernel_dim"]),
        "linear_attn.A_log": (values,),
        "linear_attn.dt_bias": (values,),
        "linear_attn.norm.weight": (size,),
        "linear_attn.out_proj.weight": (hidden, values * size),
    }


def qwen35_in_gguf(model: TinyModel, name: str, values: np.ndarray) -> tuple[str, np.ndarray]:
    """A parameter's name and values as the converter turns them, before GGUF's own names."""
    keys, heads, size = _sizes(model)

    def order(width: int, before: int = 0) -> np.ndarray:
        """The GGUF has the first value head of every key head first, then the second."""
        places = [
            before + (key * (heads // keys) + number) * width + i
            for number in range(heads // keys) for key in range(keys) for i in range(width)
        ]  # fmt: skip
        return np.array([*range(before), *places])

    within = name.partition(".linear_attn.")[2]
    if within in ("in_proj_qkv.weight", "conv1d.weight"):
        return name, values[order(size, 2 * keys * size)]
    if within == "in_proj_z.weight":
        return name, values[order(size)]
    if within in ("in_proj_a.weight", "in_proj_b.weight"):
        return name, values[order(1)]
    if within == "out_proj.weight":
        return name, values[:, order(size)]
    if within == "A_log":
        return name, -np.exp(values[order(1)])
    if within == "dt_bias":
        return name.replace("dt_bias", "dt_proj.bias"), values[order(1)]
    if not within and name.endswith("norm.weight"):
        return name, values + np.float32(1.0)
    return name, values


def qwen35_metadata(model: TinyModel) -> dict[str, Any]:
    """What the converter writes, without prefix."""
    c = model.config
    keys, values, size = _sizes(model)
    quarter = model.rotary_dim // 2
    return {
        "ssm.conv_kernel": c["linear_conv_kernel_dim"],
        "ssm.state_size": size,
        "ssm.group_count": keys,
        "ssm.time_step_rank": values,
        "ssm.inner_size": values * size,
        "attention.recurrent_layers": [
            is_delta_net(model, layer) for layer in range(c["num_hidden_layers"])
        ],
        "rope.dimension_count": model.rotary_dim,
        "rope.dimension_sections": [quarter - 2, 1, 1, 0],
    }
