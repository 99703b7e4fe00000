"""The frozen model on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gguf import quants

from forward.architecture import Architecture
from forward.gguf_file import GGUFFile
from forward.rope import rope_tables
from forward.weights import FrozenMatrix, load_matrix
from shaders.device import Device
from shaders.tensor import Tensor


@dataclass(frozen=True)
class LayerWeights:
    """The frozen weights of one decoder layer; matrices that share an input are stacked."""

    attn_norm: Tensor  # [hidden_size]
    qkv: FrozenMatrix  # [query_size + 2 · kv_size, hidden_size]
    attn_output: FrozenMatrix  # [hidden_size, query_size]
    ffn_norm: Tensor  # [hidden_size]
    gate_up: FrozenMatrix  # [2 · intermediate_size, hidden_size]
    down: FrozenMatrix  # [hidden_size, intermediate_size]


@dataclass(frozen=True)
class Model:
    """All frozen weights of a decoder."""

    architecture: Architecture
    embedding: FrozenMatrix  # [vocab_size, hidden_size]
    layers: tuple[LayerWeights, ...]
    output_norm: Tensor  # [hidden_size]
    head: FrozenMatrix  # [vocab_size, hidden_size]; the embedding itself where they are tied
    rope: Tensor  # [n_positions, rope_dimensions / 2, 2]


def load_model(
    device: Device, gguf_file: GGUFFile, architecture: Architecture, n_positions: int
) -> Model:
    """Uploads a model, matrix by matrix.

    Args:
        n_positions: the longest example, for the tables of the rotary embedding.
    """

    def matrix(*names: str) -> FrozenMatrix:
        return load_matrix(device, [gguf_file.tensors[f"{name}.weight"] for name in names])

    def vector(name: str) -> Tensor:
        tensor = gguf_file.tensors[f"{name}.weight"]
        values = quants.dequantize(tensor.data.reshape(-1), tensor.type)
        return device.upload(np.asarray(values, np.float32).reshape(-1))

    layers = []
    for i in range(architecture.n_layers):
        blk = f"blk.{i}."
        layers.append(
            LayerWeights(
                attn_norm=vector(blk + "attn_norm"),
                qkv=matrix(blk + "attn_q", blk + "attn_k", blk + "attn_v"),
                attn_output=matrix(blk + "attn_output"),
                ffn_norm=vector(blk + "ffn_norm"),
                gate_up=matrix(blk + "ffn_gate", blk + "ffn_up"),
                down=matrix(blk + "ffn_down"),
            )
        )
    embedding = matrix("token_embd")
    tables = rope_tables(n_positions, architecture.rope_dimensions, architecture.rope_base)
    return Model(
        architecture,
        embedding,
        tuple(layers),
        vector("output_norm"),
        embedding if architecture.tied_head else matrix("output"),
        device.upload(tables),
    )
