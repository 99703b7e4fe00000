"""The walk over layers: training, evaluation, recompute and a prompt's pieces all take this one.

What a layer's blocks do stands in forward/decoder/blocks.py; whom rows attend to is the walk's
`Context`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora.forward.decoder.blocks import BLOCKS
from lora.forward.decoder.recorder import BlockEnd, LayerRecorder, Walk
from lora.forward.embedding import embedding
from lora.forward.embedding_lora import add_embedding
from lora.forward.model.factors import Factors
from lora.forward.model.frozen_model import Model
from lora.forward.model.layer_spec import LayerSpec
from lora.forward.rmsnorm import LowRank, NormAfter, writes_low_rank
from lora.forward.scale_rows import scale_rows
from lora.forward.token_rows import replace_rows
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor

# The groups that take what a norm before a block gives, and that alone take it.
MIXER_INPUT, FEED_FORWARD_INPUT = "qkv", "gate_up"


@dataclass(frozen=True)
class LayerActivations:
    """What one layer computes on the way and its backward reads again.

    Of the recording's precision, but for the residual stream, the low-rank parts and the
    log-sum-exp, which are f32 always.

    Attributes:
        normed: [rows, hidden_size], what the mixer is given, with pre_norms.
        mixer: of its block, as the table allocates it.
        mixer_output: [rows, hidden_size], before its norm, with post_norms.
        middle: [rows, hidden_size], the residual stream between the blocks.
        middle_normed: [rows, hidden_size], what the feed-forward block is given, with pre_norms.
        feed_forward: of its block.
        feed_forward_output: [rows, hidden_size], before its norm, with post_norms.
        z: [rows, members · rank], by adapted group.
        products: [rows, out_features], by adapted group, before DoRA scales their columns.
        after_feed_forward: [rows, hidden_size], the residual stream before the layer's own input.
        per_layer: of that block.
        per_layer_output: [rows, hidden_size], before its norm.
        shares: whether what the backward writes again (`normed`, `middle_normed`, what the blocks'
            last products are given) lies where other layers' does.
    """

    normed: Tensor | None
    mixer: Any
    mixer_output: Tensor | None
    middle: Tensor
    middle_normed: Tensor | None
    feed_forward: Any
    feed_forward_output: Tensor | None
    z: Mapping[str, Tensor]
    after_feed_forward: Tensor | None = None
    per_layer: Any = None
    per_layer_output: Tensor | None = None
    products: Mapping[str, Tensor] = field(default_factory=dict)
    shares: bool = False

    @classmethod
    def allocate(
        cls,
        recording: Recording,
        spec: LayerSpec,
        rows: Extent,
        z: Mapping[str, Tensor],
        shared: LayerActivations | None = None,
    ) -> LayerActivations:
        """Tensors for one layer; layers of the same sizes and adapted groups can share them.

        Args:
            recording: what they are allocated with.
            spec: of the layer.
            rows: of a micro-batch.
            z: of the low-rank parts.
            shared: of layers of the same sizes; what the backward writes again is theirs, too.
        """

        def tensor(dtype: str = recording.precision) -> Tensor:
            shape = (rows.maximum, spec.hidden_size)
            return recording.memory.empty(shape, dtype, extent=rows)

        def of_block(block: Any, theirs: Any) -> Any:
            return BLOCKS[type(block)].allocate(recording, block, rows, theirs)

        normed = middle_normed = None
        if shared is not None:
            normed, middle_normed = shared.normed, shared.middle_normed
        elif spec.pre_norms:
            normed, middle_normed = tensor(), tensor()
        return cls(
            normed=normed,
            mixer=of_block(spec.mixer, shared and shared.mixer),
            mixer_output=tensor() if spec.post_norms else None,
            middle=tensor("f32"),
            middle_normed=middle_normed,
            feed_forward=of_block(spec.feed_forward, shared and shared.feed_forward),
            feed_forward_output=tensor() if spec.post_norms else None,
            z=z,
            after_feed_forward=None if spec.per_layer is None else tensor("f32"),
            per_layer=spec.per_layer and of_block(spec.per_layer, shared and shared.per_layer),
            per_layer_output=None if spec.per_layer is None else tensor(),
            shares=shared is not None,
        )


def low_rank_tensors(
    recording: Recording, factors: Factors, layer: int, rows: Extent
) -> dict[str, Tensor]:
    """The z of a layer's adapted groups, f32 [rows, members · rank] each."""
    return {
        group: recording.memory.empty((rows.maximum, lora.n_members * lora.rank), extent=rows)
        for (of_layer, group), lora in factors.items()
        if of_layer == layer
    }


def product_tensors(
    recording: Recording, model: Model, factors: Factors, layer: int, rows: Extent
) -> dict[str, Tensor]:
    """The products of a layer's groups whose columns DoRA scales, [rows, out_features] each."""
    return {
        group: recording.memory.empty(
            (rows.maximum, model.layers[layer].matrices[group].out_features),
            recording.precision,
            extent=rows,
        )
        for (of_layer, group), lora in factors.items()
        if of_layer == layer and lora.magnitude is not None
    }


def record_embedding(
    program: Program,
    model: Model,
    tokens: Tensor,
    rows: Extent,
    x: Tensor,
    factors: Factors,
) -> None:
    """Appends x = the tokens' embeddings, [rows, hidden_size].

    Args:
        factors: what is trained of the embedding is in place of the base's, or beside it.
    """
    scale = model.architecture.embedding_scale
    embedding(program, tokens, model.embedding, rows, scale=scale, out=x)
    if factors.tokens is not None:
        replace_rows(program, tokens, factors.tokens, rows, x, scale=scale)
    if factors.embedding is not None:
        add_embedding(program, tokens, factors.embedding, rows, x, scale=scale)


def record_layers(
    program: Program,
    walk: Walk,
    acts: Mapping[int, LayerActivations],
    states: Sequence[Tensor],
) -> None:
    """Appends decoder layers, one above the other.

    What finishes a layer's last product norms it for the next one, where it can.

    Args:
        program: what is appended to.
        walk: of the rows.
        acts: where the intermediate results of each layer go, from the lowest up.
        states: [rows, hidden_size] each: what enters each layer, and what leaves the last.
    """
    layers = list(acts)
    for place, layer in enumerate(layers):
        above = layers[place + 1] if place + 1 < len(layers) else None
        record_layer(
            program, walk, layer, acts[layer], states[place], states[place + 1],
            normed=place > 0,
            following=None
            if above is None
            else norm_before(program.recording, walk, above, acts[above]),
        )  # fmt: skip


def norm_before(
    recording: Recording, walk: Walk, layer: int, act: LayerActivations
) -> NormAfter | None:
    """The norm before a layer's mixer; None where it is given the stream itself."""
    norm = walk.model.layers[layer].mixer_norm
    if norm is None or act.normed is None:
        return None
    return NormAfter(norm, act.normed, low=_low_of_norm(recording, walk, layer, act, MIXER_INPUT))


def _low_of_norm(
    recording: Recording, walk: Walk, layer: int, act: LayerActivations, group: str
) -> LowRank | None:
    """The z that the norm before a group writes; None where it does not."""
    powers = walk.model.layers[layer].powers
    lora, z = powers.factors(group, walk.factors.get((layer, group))), act.z.get(group)
    if lora is None or z is None or walk.dropout is not None:
        return None
    return LowRank(lora, z) if writes_low_rank(recording, z.shape[0], lora) else None


def record_layer(
    program: Program,
    walk: Walk,
    layer: int,
    act: LayerActivations,
    x: Tensor,
    out: Tensor | None,
    *,
    normed: bool = False,
    following: NormAfter | None = None,
) -> None:
    """Appends one decoder layer: out = x + mixer + feed-forward.

    Args:
        act: where the intermediate results go.
        x: [rows, hidden_size], kept for the backward.
        out: [rows, hidden_size]; None leaves out what only the output needs (recompute). It may be
            x itself, which is not read after the mixer.
        normed: whether what is before has recorded the norm before the mixer.
        following: the norm that takes out, recorded too.
    """
    weights = walk.model.layers[layer]
    spec = weights.spec
    before, of_middle, projected = norm_before(program.recording, walk, layer, act), None, set()
    if before is not None and before.low is not None:
        projected.add(MIXER_INPUT)
    if weights.feed_forward_norm is not None and act.middle_normed is not None:
        low = _low_of_norm(program.recording, walk, layer, act, FEED_FORWARD_INPUT)
        of_middle = NormAfter(weights.feed_forward_norm, act.middle_normed, low=low)
        if low is not None:
            projected.add(FEED_FORWARD_INPUT)
    recorder = LayerRecorder(program, walk, layer, act.z, act.products, frozenset(projected))
    with program.scope(f"layers.{layer}"):
        if before is not None and not normed:
            before.record(program, x)
        end = BlockEnd(
            residual=x,
            out=act.middle,
            post_norm=weights.post_mixer_norm,
            output=act.mixer_output,
            following=of_middle,
        )
        BLOCKS[type(spec.mixer)].record(recorder, spec.mixer, act.mixer, act.normed or x, end)
        # What is scaled, or added to, is normed after that.
        scaled = None if weights.output_scale is None or out is None else weights.output_scale
        at_once = following if scaled is None else None
        end = BlockEnd(
            residual=act.middle,
            out=act.after_feed_forward or out,
            post_norm=weights.post_feed_forward_norm,
            output=act.feed_forward_output,
            following=at_once if spec.per_layer is None else None,
        )
        record = BLOCKS[type(spec.feed_forward)].record
        source = act.middle_normed or act.middle
        record(recorder, spec.feed_forward, act.feed_forward, source, end)
        if spec.per_layer is not None and act.after_feed_forward is not None:
            source = act.after_feed_forward
            end = BlockEnd(source, out, weights.post_per_layer_norm, act.per_layer_output, at_once)
            record = BLOCKS[type(spec.per_layer)].record
            record(recorder, spec.per_layer, act.per_layer, source, end)
        if scaled is not None and out is not None:
            scale_rows(program, out, scaled, label="output_scale")
            if following is not None:
                following.record(program, out)
