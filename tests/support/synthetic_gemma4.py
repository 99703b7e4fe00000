"""Gemma 4's E-types with random weights: layers of two kinds, shared keys, inputs of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.support.synthetic_shape import Shape


@dataclass(frozen=True)
class Gemma4Shape(Shape):
    """Sizes of an E-type; `head_size` and `intermediate_size` are those of layers with a window.

    Attributes:
        every: each so-many-th layer sees all.
        n_shared: layers that take others' keys and values.
        global_head_size: where all is seen.
        wide: layers that take others' keys have twice the feed-forward width.
        input_size: numbers that a token has for a layer.
    """

    every: int = 5
    n_shared: int = 20
    global_head_size: int = 512
    wide: bool = True
    input_size: int = 256

    def is_local(self, layer: int) -> bool:
        """Whether a layer has a window."""
        return (layer + 1) % self.every != 0

    def inner(self, layer: int) -> int:
        """Feed-forward width of a layer."""
        shared = layer >= self.n_layers - self.n_shared
        return self.intermediate_size * (2 if self.wide and shared else 1)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor with its shape."""
        hidden, width = self.hidden_size, self.n_layers * self.input_size
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocab_size, hidden),
            "per_layer_token_embd.weight": (self.vocab_size, width),
            "per_layer_model_proj.weight": (width, hidden),
            "per_layer_proj_norm.weight": (self.input_size,),
        }
        for layer in range(self.n_layers):
            size = self.head_size if self.is_local(layer) else self.global_head_size
            query, kv, inner = self.n_heads * size, self.n_kv_heads * size, self.inner(layer)
            of_layer: dict[str, tuple[int, ...]] = dict.fromkeys(
                ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "post_norm"),
                (hidden,),
            )
            of_layer |= {
                "attn_q": (query, hidden), "attn_q_norm": (size,), "attn_output": (hidden, query),
                "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
                "inp_gate": (self.input_size, hidden), "proj": (hidden, self.input_size),
                "layer_output_scale": (1,),
            }  # fmt: skip
            if layer < self.n_layers - self.n_shared:
                of_layer |= {
                    "attn_k": (kv, hidden), "attn_v": (kv, hidden), "attn_k_norm": (size,),
                }  # fmt: skip
            shapes |= {f"blk.{layer}.{name}.weight": sizes for name, sizes in of_layer.items()}
        return shapes | {"output_norm.weight": (hidden,)}

    def own_metadata(self) -> dict[str, Any]:
        """Keys without prefix in place of those that other shapes have."""
        layers = range(self.n_layers)
        return {
            "feed_forward_length": [self.inner(layer) for layer in layers],
            "attention.key_length": self.global_head_size,
            "attention.value_length": self.global_head_size,
            "attention.key_length_swa": self.head_size,
            "attention.value_length_swa": self.head_size,
            "attention.sliding_window": 512,
            "attention.sliding_window_pattern": [self.is_local(layer) for layer in layers],
            "attention.shared_kv_layers": self.n_shared,
            "rope.freq_base": 1e6,
            "rope.freq_base_swa": 1e4,
            "rope.dimension_count": self.global_head_size,
            "rope.dimension_count_swa": self.head_size,
            "final_logit_softcapping": 30.0,
            "embedding_length_per_layer_input": self.input_size,
            **self.metadata,
        }
