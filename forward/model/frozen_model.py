"""The frozen model on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora.forward.gguf.file import GGUFFile
from lora.forward.model.adaptable import FUSED_QKV, AdaptableMatrix
from lora.forward.model.architecture import Architecture
from lora.forward.model.host_table import HostTable
from lora.forward.model.inputs import IndexBounds, LongExamples
from lora.forward.model.layer_spec import (
    OUTPUT_SCALE,
    POST_FEED_FORWARD_NORM,
    POST_MIXER_NORM,
    POST_PER_LAYER_NORM,
    LayerSpec,
)
from lora.forward.model.model_tensors import scaled_tensor
from lora.forward.model.norm import Norm
from lora.forward.model.powers import AS_THEY_ARE, LayerPowers
from lora.forward.model.rope_frequencies import Rope, Temperature, read_vector
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
        mixer_norm, feed_forward_norm: of hidden_size columns, before the blocks, with pre_norms.
        post_mixer_norm, post_feed_forward_norm: the same after them, with post_norms.
        post_per_layer_norm: the same after the layer's input of its own, where it has one.
        vectors: other tensors of its blocks, by the names of their `stacks`, and of their
            `tables`, whose dimensions are turned round: [columns, rows]; and their `constants`.
        rope: [n_positions, rope dimensions / 2, 2] of the mixer; layers of one rope share it. With
            long_examples twice as many positions: those of long examples after the others. None
            where nothing turns.
        output_scale: f32 [4], the first of which what comes out is multiplied by; None for nothing.
        temperature: f32 [n_positions], what queries are multiplied by; None where all stay.
        powers: of what is stored as another multiple, see `lora.forward.model.balance`.
    """

    spec: LayerSpec
    matrices: Mapping[str, FrozenMatrix]
    biases: Mapping[str, Tensor]
    mixer_norm: Norm | None
    feed_forward_norm: Norm | None
    post_mixer_norm: Norm | None
    post_feed_forward_norm: Norm | None
    vectors: Mapping[str, Tensor]
    rope: Tensor | None
    temperature: Tensor | None = None
    post_per_layer_norm: Norm | None = None
    output_scale: Tensor | None = None
    powers: LayerPowers = AS_THEY_ARE


@dataclass(frozen=True)
class PerLayerWeights:
    """What every token has for each layer beside its embedding (Gemma 3n, 4).

    Attributes:
        table: [vocab_size, layers · size], on the host.
        projection: [layers · size, hidden_size], of the embedding.
        norm: of `size` columns, of what the projection gives for a layer.
        scale: of the table's rows.
    """

    table: HostTable
    projection: FrozenMatrix
    norm: Norm
    scale: float


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
    per_layer: PerLayerWeights | None = None  # what tokens have for every layer

    @property
    def host_table(self) -> HostTable | None:
        """The table whose rows the host sends for each micro-batch; None without one."""
        return None if self.per_layer is None else self.per_layer.table

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
        holds_data = recording.memory.holds_data
        found = [scaled_tensor(name, gguf_file, holds_data=holds_data) for name in names]
        return load_matrix(recording, found)

    def values(name: str) -> np.ndarray:
        return read_vector(gguf_file, tensors[name])

    def vector(name: str) -> Tensor:
        return recording.memory.upload(values(f"{name}.weight"))

    def scale(name: str) -> Tensor:
        """One number, padded to what can be bound."""
        return recording.memory.upload(np.repeat(values(f"{name}.weight"), 4))

    def temperatures(temperature: Temperature | None) -> Tensor | None:
        if temperature is None or n_positions <= temperature.length:
            return None
        return recording.memory.upload(temperature.factors(n_positions))

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

        def norm(name: str, there: bool) -> Norm | None:
            return Norm(vector(blk + name), epsilon) if there else None

        biases = {
            group: recording.memory.upload(_stacked_bias(gguf_file, spec, members, layer))
            for group, members in spec.groups.items()
            if any(m.gguf_name in spec.biases for m in members)
            or (group == "qkv" and FUSED_QKV in spec.biases)
        }
        return LayerWeights(
            spec=spec,
            matrices={group: matrix(*a.tensors_of(layer, group)) for group in spec.groups},
            biases=biases,
            mixer_norm=norm("attn_norm", spec.pre_norms),
            feed_forward_norm=norm(spec.feed_forward_norm, spec.pre_norms),
            post_mixer_norm=norm(POST_MIXER_NORM, spec.post_norms),
            post_feed_forward_norm=norm(POST_FEED_FORWARD_NORM, spec.post_norms),
            vectors={
                stack: recording.memory.upload(
                    np.concatenate([values(f"{blk}{name}.weight") for name in names])
                )
                for block in spec.blocks
                for stack, names in block.stacks.items()
            }
            | {
                name: recording.memory.upload(np.ascontiguousarray(values(blk + name).T))
                for block in spec.blocks
                for name in block.tables
            }
            | {
                name: recording.memory.upload(numbers)
                for block in spec.blocks
                for name, numbers in block.constants.items()
            },
            rope=rope_tables(spec.rope),
            temperature=temperatures(getattr(spec.mixer, "temperature", None)),
            post_per_layer_norm=norm(POST_PER_LAYER_NORM, spec.per_layer is not None),
            output_scale=scale(blk + OUTPUT_SCALE) if spec.output_scale else None,
        )

    layers = tuple(layer_weights(layer) for layer in range(a.n_layers))
    embedding = matrix("token_embd.weight")
    head = embedding if a.tied_head else matrix("output.weight")
    weight = values(f"{a.output_norm}.weight")
    if a.logit_divisor != 1.0:  # the head is linear: a factor of its input is one of its logits
        weight = weight / np.float32(a.logit_divisor)
    output_norm = Norm(recording.memory.upload(weight), a.norm_epsilon)
    per_layer = None
    if a.per_layer_size:
        table = HostTable(tensors["per_layer_token_embd.weight"])
        table.check(recording.facts)
        projection = matrix("per_layer_model_proj.weight")
        # The norm's input is to be divided by sqrt(hidden_size): so is its epsilon's root.
        norm = Norm(vector("per_layer_proj_norm"), a.norm_epsilon * a.hidden_size)
        per_layer = PerLayerWeights(table, projection, norm, a.per_layer_size**0.5)
    return Model(a, embedding, layers, output_norm, head, n_positions, long_examples, per_layer)


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
