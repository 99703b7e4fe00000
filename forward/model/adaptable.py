"""The matrices that LoRA can adapt, under PEFT's names and under GGUF's, by kind of block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import numpy as np

from lora.forward.model.row_order import permute_rows_to_gguf

# Where PEFT finds the layers: in a class for text alone, and in one for text and images.
TEXT_LAYERS, LANGUAGE_LAYERS = "model.layers", "model.language_model.layers"
FUSED_QKV = "attn_qkv"  # within a layer: rows of q, then of k, then of v


@dataclass(frozen=True)
class AdaptableMatrix:
    """A matrix that LoRA can adapt, under PEFT's name and under GGUF's.

    Attributes:
        module: PEFT's name for it, as in the config's `adapter.targets`.
        peft_parent: the module that holds it within a layer; "" for the layer itself, and the head.
        gguf_name: its name within a layer of the GGUF.
        group: matrices of one group share their input and are stacked.
        in_field, out_field: the field of a LayerSpec (of Architecture, for the head) that is its
            number of columns, of rows.
        heads_field: the field that counts its heads where rope turns its output, else None.
        value_heads: "rows" or "columns" if those are of value heads (the last of them, where there
            are others), which GGUF and Hugging Face's model have in orders of their own; "" if not.
    """

    module: str
    peft_parent: str
    gguf_name: str
    group: str
    in_field: str
    out_field: str
    heads_field: str | None = None
    value_heads: str = ""

    def tensor_name(self, layer: int) -> str:
        """Its tensor in the GGUF, for example `blk.3.attn_q.weight`."""
        return f"blk.{layer}.{self.gguf_name}.weight"

    def peft_path(self, layer: int) -> str:
        """Its module in the Hugging Face model, e.g. `model.layers.3.self_attn.q_proj`."""
        if self.group == HEAD_GROUP:
            return self.module
        if self.group == EMBEDDING_GROUP:
            return f"model.{self.module}"
        parent = f"{self.peft_parent}." if self.peft_parent else ""
        return f"{TEXT_LAYERS}.{layer}.{parent}{self.module}"

    def in_size(self, of: Any) -> int:
        """Its number of columns: A is [rank, in_size].

        Args:
            of: the LayerSpec of its layer; the Architecture, for the head.
        """
        return int(attrgetter(self.in_field)(of))

    def out_size(self, of: Any) -> int:
        """Its number of rows: B is [out_size, rank]; argument as of `in_size`."""
        return int(attrgetter(self.out_field)(of))

    def permuted_heads(self, of: Any) -> int | None:
        """The heads within which the GGUF permutes its rows; None where the order is PEFT's."""
        if self.heads_field is None or not of.mixer.permuted:
            return None
        return int(attrgetter(self.heads_field)(of))

    def row_order(self, of: Any) -> np.ndarray | None:
        """Which of PEFT's rows each of the GGUF's is, int [out_size]; None where all are alike."""
        heads, size = self.permuted_heads(of), self.out_size(of)
        if heads is not None:
            return permute_rows_to_gguf(np.arange(size), heads)
        return of.mixer.value_order(size) if self.value_heads == "rows" else None

    def column_order(self, of: Any) -> np.ndarray | None:
        """The same of its columns, int [in_size]."""
        return of.mixer.value_order(self.in_size(of)) if self.value_heads == "columns" else None


def _matrix(path: str, gguf_name: str, group: str, *sizes: str) -> AdaptableMatrix:
    parent, _, module = path.rpartition(".")
    return AdaptableMatrix(module, parent, gguf_name, group, *sizes)


_OUTPUT = _matrix(
    "self_attn.o_proj", "attn_output", "attn_output", "mixer.query_size", "hidden_size"
)
ATTENTION = (
    _matrix(
        "self_attn.q_proj", "attn_q", "qkv", "hidden_size", "mixer.query_rows", "mixer.n_heads"
    ),
    _matrix(
        "self_attn.k_proj", "attn_k", "qkv", "hidden_size", "mixer.kv_size", "mixer.n_kv_heads"
    ),
    _matrix("self_attn.v_proj", "attn_v", "qkv", "hidden_size", "mixer.kv_size"),
    _OUTPUT,
)
LFM2_ATTENTION = (*ATTENTION[:3], replace(_OUTPUT, module="out_proj"))
FUSED_ATTENTION = (
    _matrix("self_attn.qkv_proj", FUSED_QKV, "qkv", "hidden_size", "mixer.qkv_size"),
    _OUTPUT,
)
_INNER = "feed_forward.intermediate_size"
_DOWN = _matrix("mlp.down_proj", "ffn_down", "down", _INNER, "hidden_size")
GATED = (
    _matrix("mlp.gate_proj", "ffn_gate", "gate_up", "hidden_size", _INNER),
    _matrix("mlp.up_proj", "ffn_up", "gate_up", "hidden_size", _INNER),
    _DOWN,
)
LFM2_GATED = tuple(
    replace(matrix, module=module, peft_parent="feed_forward")
    for matrix, module in zip(GATED, ("w1", "w3", "w2"), strict=True)
)
FUSED_GATED = (
    _matrix("mlp.gate_up_proj", "ffn_up", "gate_up", "hidden_size", "feed_forward.gate_up_size"),
    _DOWN,
)
PER_LAYER = (
    _matrix("per_layer_input_gate", "inp_gate", "inp_gate", "hidden_size", "per_layer.size"),
    _matrix("per_layer_projection", "proj", "proj", "per_layer.size", "hidden_size"),
)
SHORT_CONVOLUTION = (
    _matrix("conv.in_proj", "shortconv.in_proj", "conv_in", "hidden_size", "mixer.in_size"),
    _matrix("conv.out_proj", "shortconv.out_proj", "conv_out", "mixer.width", "hidden_size"),
)
DELTA_NET = (
    replace(
        _matrix(
            "linear_attn.in_proj_qkv", "attn_qkv", "delta_in", "hidden_size", "mixer.conv_size"
        ),
        value_heads="rows",
    ),
    *(
        replace(
            _matrix(f"linear_attn.{module}", name, "delta_in", "hidden_size", rows),
            value_heads="rows",
        )
        for module, name, rows in (
            ("in_proj_z", "attn_gate", "mixer.value_size"),
            ("in_proj_b", "ssm_beta", "mixer.value_heads"),
            ("in_proj_a", "ssm_alpha", "mixer.value_heads"),
        )
    ),
    replace(
        _matrix("linear_attn.out_proj", "ssm_out", "delta_out", "mixer.value_size", "hidden_size"),
        value_heads="columns",
    ),
)
HEAD_GROUP = "head"
HEAD = _matrix("lm_head", "output", HEAD_GROUP, "hidden_size", "vocab_size")
EMBEDDING_GROUP = "embedding"
EMBEDDING = _matrix("embed_tokens", "token_embd", EMBEDDING_GROUP, "vocab_size", "hidden_size")
EMBEDDING_PATH = EMBEDDING.peft_path(-1)
_ALL = (
    *(*ATTENTION, *GATED, *FUSED_ATTENTION, *FUSED_GATED, *PER_LAYER),
    *(*SHORT_CONVOLUTION, *LFM2_GATED, *DELTA_NET, HEAD, EMBEDDING),
)
MODULE_NAMES = tuple(dict.fromkeys(matrix.module for matrix in _ALL))
