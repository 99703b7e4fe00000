"""The frozen model on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora.forward.gguf.file import GGUFFile
from lora.forward.model.architecture import FUSED_QKV, AdaptableMatrix, Architecture
from lora.forward.model.inputs import LongExamples
from lora.forward.model.rope_frequencies import Rope, read_vector
from lora.forward.model.weights import FrozenMatrix, load_matrix
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor


@dataclass(frozen=True)
class LayerWeights:
    """The frozen weights of one decoder layer; matrices that share an input are stacked."""

    attn_norm: Tensor  # [hidden_size]
    qkv: FrozenMatrix  # [query_size + 2 · kv_size, hidden_size]
    attn_output: FrozenMatrix  # [hidden_size, query_size]
    ffn_norm: Tensor  # [hidden_size]
    gate_up: FrozenMatrix  # [2 · intermediate_size, hidden_size]
    down: FrozenMatrix  # [hidden_size, intermediate_size]
    rope: Tensor  # [n_positions, rope dimensions / 2, 2]; layers of one kind share it. With
    # long_examples twice as many positions: those of long examples after the others
    biases: Mapping[str, Tensor]  # group → [out_features of its matrices], where it has one
    q_norm: Tensor | None  # [head_size], with qk_norm
    k_norm: Tensor | None  # [head_size], with qk_norm
    post_attention_norm: Tensor | None  # [hidden_size], with post_norms
    post_ffn_norm: Tensor | None  # [hidden_size], with post_norms


@dataclass(frozen=True)
class Model:
    """All frozen weights of a decoder."""

    architecture: Architecture
    embedding: FrozenMatrix  # [logits_size, hidden_size]: rows of zeros after the vocabulary
    layers: tuple[LayerWeights, ...]
    output_norm: Tensor  # [hidden_size]
    head: FrozenMatrix  # [logits_size, hidden_size]; the embedding itself where they are tied
    long_examples: LongExamples | None  # with LongRoPE, where examples can be that long


def load_model(
    recording: Recording, gguf_file: GGUFFile, architecture: Architecture, n_positions: int
) -> Model:
    """Uploads a model, matrix by matrix.

    Args:
        n_positions: of the longest example, for the tables of the rotary embedding.
    """

    tensors, a = gguf_file.tensors, architecture

    def matrix(*names: str) -> FrozenMatrix:
        return load_matrix(recording, [tensors[name] for name in names])

    def vector(name: str) -> Tensor:
        return recording.memory.upload(read_vector(gguf_file, tensors[f"{name}.weight"]))

    contexts = {kind.rope.long.original_context for kind in a.layer_kinds if kind.rope.long}
    long_examples = None
    if contexts and n_positions > min(contexts):
        long_examples = LongExamples(min(contexts), n_positions)
    ropes: dict[Rope, Tensor] = {}
    for kind in a.layer_kinds:
        if kind.rope not in ropes:
            tables = kind.rope.tables(n_positions)
            if long_examples is not None:
                tables = np.concatenate([tables, kind.rope.tables(n_positions, long=True)])
            ropes[kind.rope] = recording.memory.upload(tables, purpose="rope tables")

    def layer_weights(layer: int) -> LayerWeights:
        blk = f"blk.{layer}."
        groups = {group: matrix(*a.tensors_of(layer, group)) for group in a.groups}
        biases = {
            group: recording.memory.upload(_stacked_bias(gguf_file, a, members, layer))
            for group, members in a.groups.items()
            if any(m.gguf_name in a.biases for m in members)
            or (group == "qkv" and FUSED_QKV in a.biases)
        }
        return LayerWeights(
            attn_norm=vector(blk + "attn_norm"),
            ffn_norm=vector(blk + "ffn_norm"),
            rope=ropes[a.layer_kinds[layer].rope],
            biases=biases,
            q_norm=vector(blk + "attn_q_norm") if a.qk_norm else None,
            k_norm=vector(blk + "attn_k_norm") if a.qk_norm else None,
            post_attention_norm=vector(blk + "post_attention_norm") if a.post_norms else None,
            post_ffn_norm=vector(blk + "post_ffw_norm") if a.post_norms else None,
            **groups,
        )

    layers = tuple(layer_weights(layer) for layer in range(a.n_layers))
    embedding = matrix("token_embd.weight")
    head = embedding if a.tied_head else matrix("output.weight")
    return Model(a, embedding, layers, vector("output_norm"), head, long_examples)


def _stacked_bias(
    gguf_file: GGUFFile, a: Architecture, members: Sequence[AdaptableMatrix], layer: int
) -> np.ndarray:
    """The biases of matrices that are stacked, f32 [out_features]; zero for one without."""
    whole = gguf_file.tensors.get(f"blk.{layer}.{FUSED_QKV}.bias")
    if whole is not None and a.layer_kinds[layer].fused_qkv and members[0].group == "qkv":
        return read_vector(gguf_file, whole)
    return np.concatenate(
        [
            read_vector(gguf_file, gguf_file.tensors[f"blk.{layer}.{m.gguf_name}.bias"])
            if m.gguf_name in a.biases
            else np.zeros(m.out_size(a), np.float32)
            for m in members
        ]
    )
