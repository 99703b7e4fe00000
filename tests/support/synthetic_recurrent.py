"""Models with random weights whose layers carry states: LFM2, Qwen3.5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.support.synthetic_shape import Shape


@dataclass(frozen=True)
class Lfm2Shape(Shape):
    """Sizes of an LFM2; `attention` has the layers of attention, the others are convolutions."""

    attention: tuple[int, ...] = ()
    taps: int = 3

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor with its shape."""
        hidden, inner, size = self.hidden_size, self.intermediate_size, self.head_size
        query, kv = self.n_heads * size, self.n_kv_heads * size
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.vocab_size, hidden)}
        for layer in range(self.n_layers):
            of_layer: dict[str, tuple[int, ...]] = {
                "attn_norm": (hidden,), "ffn_norm": (hidden,), "ffn_gate": (inner, hidden),
                "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
            }  # fmt: skip
            if layer in self.attention:
                of_layer |= {
                    "attn_q": (query, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
                    "attn_output": (hidden, query), "attn_q_norm": (size,), "attn_k_norm": (size,),
                }  # fmt: skip
            else:
                of_layer |= {
                    "shortconv.in_proj": (3 * hidden, hidden),
                    "shortconv.out_proj": (hidden, hidden),
                    "shortconv.conv": (hidden, self.taps),
                }
            shapes |= {f"blk.{layer}.{name}.weight": sizes for name, sizes in of_layer.items()}
        return shapes | {"token_embd_norm.weight": (hidden,)}

    def own_metadata(self) -> dict[str, Any]:
        """Keys without prefix in place of those that other shapes have."""
        layers = range(self.n_layers)
        return {
            "attention.head_count_kv": [
                self.n_kv_heads if layer in self.attention else 0 for layer in layers
            ],
            "shortconv.l_cache": self.taps,
            "rope.freq_base": 1e6,
            **self.metadata,
        }

    def peer(self) -> tuple[str, str, dict[str, Any]]:
        """Transformers' classes of config and model, and what the config is given."""
        kinds = {True: "full_attention", False: "conv"}
        return (
            "Lfm2Config",
            "Lfm2ForCausalLM",
            {
                "layer_types": [kinds[layer in self.attention] for layer in range(self.n_layers)],
                "block_auto_adjust_ff_dim": False,
                "conv_L_cache": self.taps,
            },
        )


@dataclass(frozen=True)
class Qwen35Shape(Shape):
    """Sizes of a dense Qwen3.5: every `every`th layer is attention, the others DeltaNets."""

    key_heads: int = 16
    value_heads: int = 16
    delta_size: int = 128
    every: int = 4
    taps: int = 4

    def is_delta_net(self, layer: int) -> bool:
        """Whether a layer is a gated DeltaNet."""
        return (layer + 1) % self.every != 0

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor with its shape."""
        hidden, inner, size = self.hidden_size, self.intermediate_size, self.head_size
        query, kv = self.n_heads * size, self.n_kv_heads * size
        values = self.value_heads * self.delta_size
        width = 2 * self.key_heads * self.delta_size + values
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.vocab_size, hidden)}
        for layer in range(self.n_layers):
            of_layer: dict[str, tuple[int, ...]] = {
                "attn_norm.weight": (hidden,), "post_attention_norm.weight": (hidden,),
                "ffn_gate.weight": (inner, hidden), "ffn_up.weight": (inner, hidden),
                "ffn_down.weight": (hidden, inner),
            }  # fmt: skip
            if self.is_delta_net(layer):
                of_layer |= {
                    "attn_qkv.weight": (width, hidden), "attn_gate.weight": (values, hidden),
                    "ssm_alpha.weight": (self.value_heads, hidden),
                    "ssm_beta.weight": (self.value_heads, hidden),
                    "ssm_a": (self.value_heads,), "ssm_dt.bias": (self.value_heads,),
                    "ssm_conv1d.weight": (width, self.taps),
                    "ssm_norm.weight": (self.delta_size,), "ssm_out.weight": (hidden, values),
                }  # fmt: skip
            else:
                of_layer |= {
                    "attn_q.weight": (2 * query, hidden), "attn_k.weight": (kv, hidden),
                    "attn_v.weight": (kv, hidden), "attn_output.weight": (hidden, query),
                    "attn_q_norm.weight": (size,), "attn_k_norm.weight": (size,),
                }  # fmt: skip
            shapes |= {f"blk.{layer}.{name}": sizes for name, sizes in of_layer.items()}
        shapes["output_norm.weight"] = (hidden,)
        if not self.tied_head:
            shapes["output.weight"] = (self.vocab_size, hidden)
        return shapes

    def own_metadata(self) -> dict[str, Any]:
        """Keys without prefix in place of those that other shapes have."""
        return {
            "full_attention_interval": self.every,
            "ssm.conv_kernel": self.taps,
            "ssm.state_size": self.delta_size,
            "ssm.group_count": self.key_heads,
            "ssm.time_step_rank": self.value_heads,
            "ssm.inner_size": self.value_heads * self.delta_size,
            "rope.freq_base": 1e7,
            "rope.dimension_count": self.head_size // 4,
            **self.metadata,
        }

    def values(self, name: str, sizes: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        """Numbers of a tensor of F32."""
        if name.endswith("ssm_a"):
            return -np.exp(rng.normal(0.5, 1.0, sizes)).astype(np.float32)
        if name.endswith("ssm_dt.bias"):
            return rng.normal(-3.0, 1.0, sizes).astype(np.float32)
        return super().values(name, sizes, rng)

    def peer(self) -> tuple[str, str, dict[str, Any]]:
        """Transformers' classes of config and model, and what the config is given."""
        kinds = {True: "linear_attention", False: "full_attention"}
        layers = range(self.n_layers)
        return (
            "Qwen3_5TextConfig",
            "Qwen3_5ForCausalLM",
            {
                "layer_types": [kinds[self.is_delta_net(layer)] for layer in layers],
                "linear_conv_kernel_dim": self.taps,
                "linear_key_head_dim": self.delta_size,
                "linear_value_head_dim": self.delta_size,
                "linear_num_key_heads": self.key_heads,
                "linear_num_value_heads": self.value_heads,
            },
        )
