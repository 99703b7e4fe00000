"""A model's sizes and tensor types, for files of random weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type

_NEVER_QUANTIZED = (
    "layer_output_scale.weight", "ssm_conv1d.weight", "shortconv.conv.weight", "ssm_a",
    "ssm_dt.bias",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A model's sizes; `types` maps the ending of a tensor's name to its type."""

    architecture: str
    n_layers: int
    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    vocab_size: int
    types: dict[str, str]
    metadata: dict[str, Any] = field(default_factory=dict)
    tied_head: bool = True

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor with its shape."""
        hidden, inner = self.hidden_size, self.intermediate_size
        query, kv = self.n_heads * self.head_size, self.n_kv_heads * self.head_size
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.vocab_size, hidden)}
        of_layer: dict[str, tuple[int, ...]] = {
            "attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q": (query, hidden),
            "attn_k": (kv, hidden), "attn_v": (kv, hidden), "attn_output": (hidden, query),
            "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
        }  # fmt: skip
        if self.architecture == "gemma3":
            of_layer |= {
                "attn_q_norm": (self.head_size,), "attn_k_norm": (self.head_size,),
                "post_attention_norm": (hidden,), "post_ffw_norm": (hidden,),
            }  # fmt: skip
        for layer in range(self.n_layers):
            shapes |= {f"blk.{layer}.{name}.weight": size for name, size in of_layer.items()}
        shapes["output_norm.weight"] = (hidden,)
        if not self.tied_head:
            shapes["output.weight"] = (self.vocab_size, hidden)
        return shapes

    def type_of(self, name: str) -> Type:
        """A tensor's type: of the longest ending that fits; norms are F32."""
        if "norm" in name or name.endswith(_NEVER_QUANTIZED):
            return Type.F32
        # output.weight is the head's alone, not blk.0.attn_output.weight's.
        fitting = [ending for ending in self.types if f".{name}".endswith(f".{ending}")]
        return Type[self.types[max(fitting, key=len)]]

    def own_metadata(self) -> dict[str, Any]:
        """Keys without prefix in place of those that all shapes have."""
        return self.metadata

    def values(self, name: str, sizes: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        """Numbers of a tensor of F32: near one, or those of a convolution."""
        if "conv" in name:
            return (rng.normal(size=sizes) * sizes[-1] ** -0.5).astype(np.float32)
        return (1 + 0.1 * rng.normal(size=sizes)).astype(np.float32)
