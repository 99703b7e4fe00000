"""The frozen model on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora.forward.gguf.file import GGUFFile
from lora.forward.model.architecture import Architecture
from lora.forward.model.inputs import IndexBounds, LongExamples
from lora.forward.model.layer_spec import FUSED_QKV, AdaptableMatrix, LayerSpec
from lora.forward.model.norm import Norm
from lora.forward.model.rope_frequencies import Rope, read_vector
from lora.forward.model.weights import FrozenMatrix, load_matrix
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

_POSITIONS_AT_ONCE = 1 << 16  # whose cosines and sines are computed


@dataclass(frozen=True)
class LayerWeights:
    """The frozen weights of one decoder layer.

    Attributes:
        spec: what the layer is made of.
        matrices: by group, [out_features, in_features]; those that share an input are stacked.
        biases: by group, [out_features], where it has one.
        mixer_norm, feed_forward_norm: of hidden_size columns, before the blocks.
        post_mixer_norm, post_feed_forward_norm: the same after them, with post_norms.
        vectors: other tensors of its blocks, by GGUF name within the layer.
        rope: [n_positions, rope dimensions / 2, 2] of the mixer; layers of one rope share it. With
            long_examples twice as many positions: those of long examples after the others. None
            where nothing turns.
    """

    spec: LayerSpec
    matrices: Mapping[str, FrozenMatrix]
    biases: Mapping[str, Tensor]
    mixer_norm: Norm
    feed_forward_norm: Norm
    post_mixer_norm: Norm | None
    post_feed_forward_norm: Norm | None
    vectors: Mapping[str, Tensor]
    rope: Tensor | None


@dataclass(frozen=True)
class Model:
    """All frozen weights of a decoder."""

    architecture: Architecture
    embedding: FrozenMatrix  # [logits_size, hidden_size]: rows of zeros after the vocabulary
    layers: tuple[LayerWeights, ...]
    output_norm: Norm  # of hidden_size columns
    head: FrozenMatrix  # [logits_size, hidden_size]; the embedding itself where they are tied
    n_positions: int  # of the longest example, or text
    long_examples: LongExamples | None  # with LongRoPE, where examples can be that long

    @property
    def bounds(self) -> IndexBounds:
        """Where what indexes the model must end."""
        n_tables = 1 if self.long_examples is None else 2
        return IndexBounds(self.architecture.vocab_size, n_tables * self.n_positions)


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

    all_ropes = {spec.rope for spec in a.layers}
    contexts = {rope.long.original_context for rope in all_ropes if rope and rope.long}
    long_examples = None
    if contexts and n_positions > min(contexts):
        long_examples = LongExamples(min(contexts), n_positions)
    ropes: dict[Rope, Tensor] = {}

    def rope_tables(rope: Rope | None) -> Tensor | None:
        if rope is None:
            return None
        if rope not in ropes:
            halves = (False,) if long_examples is None else (False, True)
            shape = (len(halves) * n_positions, rope.dimensions // 2, 2)
            ropes[rope] = tables = recording.memory.empty(shape, purpose="rope tables")
            # In pieces: those of a million positions have gigabytes while they are computed.
            starts = (
                range(0, n_positions, _POSITIONS_AT_ONCE) if recording.memory.holds_data else ()
            )
            for half, long in enumerate(halves):
                for first in starts:
                    count = min(_POSITIONS_AT_ONCE, n_positions - first)
                    piece = rope.tables(count, long=long, first=first)
                    recording.memory.write_rows(tables, half * n_positions + first, piece)
        return ropes[rope]

    def layer_weights(layer: int) -> LayerWeights:
        blk, spec = f"blk.{layer}.", a.layers[layer]
        epsilon = spec.norm_epsilon

        def norm(name: str) -> Norm:
            return Norm(vector(blk + name), epsilon)

        biases = {
            group: recording.memory.upload(_stacked_bias(gguf_file, spec, members, layer))
            for group, members in spec.groups.items()
            if any(m.gguf_name in spec.biases for m in members)
            or (group == "qkv" and FUSED_QKV in spec.biases)
        }
        post_norms = spec.post_norms
        return LayerWeights(
            spec=spec,
            matrices={group: matrix(*a.tensors_of(layer, group)) for group in spec.groups},
            biases=biases,
            mixer_norm=norm("attn_norm"),
            feed_forward_norm=norm("ffn_norm"),
            post_mixer_norm=norm("post_attention_norm") if post_norms else None,
            post_feed_forward_norm=norm("post_ffw_norm") if post_norms else None,
            vectors={
                name: vector(blk + name)
                for block in (spec.mixer, spec.feed_forward)
                for name in block.vectors
            },
            rope=rope_tables(spec.rope),
        )

    layers = tuple(layer_weights(layer) for layer in range(a.n_layers))
    embedding = matrix("token_embd.weight")
    head = embedding if a.tied_head else matrix("output.weight")
    output_norm = Norm(vector("output_norm"), a.norm_epsilon)
    return Model(a, embedding, layers, output_norm, head, n_positions, long_examples)


def _stacked_bias(
    gguf_file: GGUFFile, spec: LayerSpec, members: Sequence[AdaptableMatrix], layer: int
) -> np.ndarray:
    """The biases of matrices that are stacked, f32 [out_features]; zero for one without."""
    whole = gguf_file.tensors.get(f"blk.{layer}.{FUSED_QKV}.bias")
    if whole is not None and spec.fused_tensor and members[0].group == "qkv":
        return read_vector(gguf_file, whole)
    return np.concatenate(
        [
            read_vector(gguf_file, gguf_file.tensors[f"blk.{layer}.{m.gguf_name}.bias"])
            if m.gguf_name in spec.biases
            else np.zeros(m.out_size(spec), np.float32)
            for m in members
        ]
    )
