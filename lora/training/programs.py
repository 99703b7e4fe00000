"""The programs of a run: everything that happens on the device, recorded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora.backward.decoder import record_head_backward, record_layer_backward
from lora.backward.embedding_lora import embedding_lora_gradients
from lora.backward.losses import Loss, LossTensors
from lora.backward.recorder import BackwardPass
from lora.backward.scratch import allocate_scratch
from lora.backward.token_rows import embedding_gradient
from lora.forward.cross_entropy import Criterion
from lora.forward.decoder.head import record_evaluation
from lora.forward.decoder.layers import (
    record_embedding,
    record_layer,
    record_layers,
)
from lora.forward.decoder.per_layer_block import record_per_layer_inputs
from lora.forward.decoder.recorder import Walk
from lora.forward.embedding_noise import EmbeddingNoise
from lora.forward.model.adapter import AdapterLayout
from lora.forward.model.factors import Factors
from lora.forward.model.frozen_model import Model
from lora.forward.model.inputs import Inputs
from lora.optim.adamw import AdamWSettings
from lora.optim.clipping import gradient_norm, sum_slices
from lora.optim.guard import METRICS, GuardState, Scaling, scaled_weight, step_guard
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor
from lora.training.activations import Activations, allocate_layer
from lora.training.adapter_state import AdapterState, factors_of
from lora.training.exchange import Piece, stretches
from lora.training.noise import Noise

# What gradients of activations are multiplied by under f16, which would lose small ones: 2^-24 is
# the least that it holds, and the mean over some hundred tokens makes them small. A power of two
# changes no bit of an f32 (Micikevicius et al. 2018, "Mixed Precision Training").
SCALING = Scaling(begin=1024.0)


def record_prefix(
    recording: Recording,
    model: Model,
    inputs: Inputs,
    act: Activations,
    lowest_layer: int,
    noise: EmbeddingNoise | None = None,
    factors: Factors | None = None,
) -> Program:
    """Embedding and the layers below the lowest adapted one: act.boundary from the tokens.

    Args:
        factors: of the adapter, for what it changes of the embedding; None for the bare model.
    """
    program = Program(recording)
    with program.scope("prefix"):
        of_embedding = Factors() if factors is None else factors
        record_embedding(program, model, inputs.tokens, inputs.rows, act.boundary, of_embedding)
        if noise is not None:
            noise.record(program, act.boundary)
        record_per_layer_inputs(program, model, act.boundary, inputs.table_rows, act.per_layer)
        below = {layer: act.shared[layer] for layer in range(lowest_layer)}
        walk = Walk(model, Factors(), act.context(inputs))
        record_layers(program, walk, below, [act.boundary] * (lowest_layer + 1))
    return program


def record_forward_only(
    recording: Recording,
    model: Model,
    inputs: Inputs,
    act: Activations,
    layout: AdapterLayout,
    adapter: Tensor | AdapterState | None,
) -> Program:
    """From act.boundary through the upper layers: `last_states`.

    Args:
        adapter: or its parameters alone, where it has neither magnitudes nor tokens; None for the
            bare model.
    """
    program = Program(recording)
    factors = factors_of(layout, adapter)
    walk = Walk(model, factors, act.context(inputs))
    layers = range(layout.lowest_layer, model.architecture.n_layers)
    acts = {layer: act.shared[layer] for layer in layers}
    record_layers(program, walk, acts, [act.boundary, *[act.final] * len(acts)])
    return program


def record_eval(
    recording: Recording,
    model: Model,
    inputs: Inputs,
    act: Activations,
    layout: AdapterLayout,
    adapter: Tensor | AdapterState | None,
) -> Program:
    """From act.boundary to the losses and argmaxes of all targets, without gradients."""
    program = record_forward_only(recording, model, inputs, act, layout, adapter)
    factors = factors_of(layout, adapter)
    x = last_states(model, layout, act)
    record_evaluation(program, model, inputs, factors, act.head, x)
    return program


def last_states(model: Model, layout: AdapterLayout, act: Activations) -> Tensor:
    """Where the output of the last layer lies: with no layer adapted, the prefix ends in it."""
    only_head = layout.lowest_layer == model.architecture.n_layers
    return act.boundary if only_head else act.final


@dataclass(frozen=True)
class StepTensors:
    """What the programs of a step work on."""

    model: Model
    inputs: Inputs
    layout: AdapterLayout
    adapter: AdapterState
    activations: Activations
    noise: Noise


@dataclass(frozen=True)
class StepSettings:
    """How a step goes.

    Attributes:
        recomputed: of how many of the lowest adapted layers only the input is kept, and which are
            run again in the backward pass.
        loss: writes what each trained token counts.
        adamw: of the optimizer.
        max_norm: of the gradient; None for no clipping.
        combined: whether the gradients of several processes are added up before their norm.
        criterion: what is minimized; None for −log p of each label.
    """

    recomputed: int
    loss: Loss
    adamw: AdamWSettings
    max_norm: float | None
    combined: bool = False
    criterion: Criterion | None = None


class TrainingPrograms:
    """The programs of one optimizer step.

    begin; then for each micro-batch prefix (or its result out of a cache) and `micro_batch`; then
    finish. Between them the host only writes inputs; nothing waits. Where gradients are combined
    the last micro-batch runs as `pieces`, and the processes add each up (`GradientExchange`).

    Attributes:
        loss_weight: the uniform of `loss_weight_words`.
        loss_scale: what gradients of activations are multiplied by at first, and what the host
            puts into `loss_weight`; `begin` exchanges it for the scale of now.
        scaling: how that follows the gradients, so that a step may have to be run again; None where
            it stays.
        step_words: the uniform of `lora.optim.adamw.step_words`.
        pieces: `micro_batch` cut where some layer's gradients are whole, each with the sum of its
            slices; none where nothing is combined, since `finish` then sums the slices.
    """

    def __init__(self, recording: Recording, tensors: StepTensors, settings: StepSettings) -> None:
        adapter, act = tensors.adapter, tensors.activations
        scaling = SCALING if recording.precision == "f16" else None
        self.scaling = scaling
        self.loss_scale = 1.0 if scaling is None else scaling.begin
        first = np.zeros(METRICS, np.float32)
        GuardState(scale=self.loss_scale).put_into(first)
        recording.memory.write(act.metrics, first)
        self.step_words = recording.memory.uniform()
        self.begin = Program(recording)
        for gradient in adapter.gradients:
            self.begin.clear(gradient, label="clear gradients")
        self.begin.clear(act.loss_sum, label="clear loss sum")
        if adapter.dora is not None:
            adapter.dora.record_update(self.begin)
        loss = LossTensors.allocate(recording, tensors.inputs, act.head.losses)
        self.loss_weight = loss.scale
        if scaling is not None:
            self.loss_weight = recording.memory.uniform()
            scaled = recording.memory.empty((4,))
            scaled_weight(self.begin, act.metrics, self.loss_weight, scaled, scaling)
            self.begin.copy(scaled, loss.scale, label="loss weight")
        self.micro_batch, reached = _record_micro_batch(recording, tensors, settings, loss)
        self.pieces: tuple[Piece, ...] = ()
        slices = adapter.gradients
        if settings.combined:
            self.pieces = _cut(self.micro_batch, reached, tensors.layout, slices)
            slices = slices[:1]
        self.finish = Program(recording)
        with self.finish.scope("optimizer"):
            max_norm = settings.max_norm
            gradient_norm(self.finish, slices, act.state, max_norm=max_norm)
            step_guard(self.finish, act.metrics, scaling=scaling, max_norm=max_norm)
            flat = adapter.parameters, slices[0]
            adapter.optimizer.record(self.finish, flat, act.state, self.step_words, settings.adamw)

    @property
    def all(self) -> tuple[Program, ...]:
        """Those that there are, in the order in which they run."""
        sums = [piece.sum for piece in self.pieces if piece.sum is not None]
        return (self.begin, self.micro_batch, *sums, self.finish)


def _record_micro_batch(
    recording: Recording, tensors: StepTensors, settings: StepSettings, loss: LossTensors
) -> tuple[Program, dict[int, int]]:
    """Layers upwards, the head with its loss, and layers downwards.

    Returns:
        The program, and how many commands it has up to the gradients of each layer, of the head
        (n_layers) first.
    """
    program = Program(recording)
    model, inputs, layout = tensors.model, tensors.inputs, tensors.layout
    act, adapter = tensors.activations, tensors.adapter
    factors = adapter.factors(layout)
    slices = [layout.factors(gradient) for gradient in adapter.gradients]
    gradients = {key: [s[key] for s in slices] for key in factors}
    d_tokens = layout.token_rows(adapter.gradients[0]) if layout.tokens else None
    layers = range(layout.lowest_layer, model.architecture.n_layers)
    scratch = allocate_scratch(recording, model, inputs, factors)
    walk = Walk(model, factors, act.context(inputs), tensors.noise.dropout)
    shared = BackwardPass(
        model, inputs, factors, gradients, scratch, act.per_layer, tensors.noise.dropout,
        settings.criterion, d_tokens,
    )  # fmt: skip
    shape = act.boundary.shape
    kept = {
        layer: act.boundary
        if layer == layout.lowest_layer
        else recording.memory.empty(shape, extent=inputs.rows, purpose="kept inputs")
        for layer in layers
    }
    if layers:
        kept[layers.stop] = act.final
    first_kept = layout.lowest_layer + settings.recomputed
    computed = {
        layer: act.shared[layer]
        if layer < first_kept or layer == layers[-1]
        else allocate_layer(recording, model, inputs, factors, layer, act.shared[layer])
        for layer in layers
    }
    record_layers(program, walk, computed, list(kept.values()))
    with program.scope("backward"):
        record_head_backward(
            program, shared, act.head, last_states(model, layout, act), settings.loss, loss,
            act.loss_sum, lowest=not layers,
        )  # fmt: skip
        reached = {model.architecture.n_layers: len(program.commands)}
        # The last layer's activations are still there.
        again = {layer for layer in layers[:-1] if layer < first_kept}
        for layer in reversed(layers):
            if layer in again:
                with program.scope("recompute"):
                    record_layer(program, walk, layer, computed[layer], kept[layer], None)
            record_layer_backward(
                program, shared, layer, computed[layer], kept[layer],
                lowest=layer == layout.lowest_layer and not layout.below_layers,
                # Pieces end where a layer's gradients are whole.
                waits=layer - 1 in layers and layer - 1 not in again and not settings.combined,
            )  # fmt: skip
            reached[layer] = len(program.commands)
        if factors.tokens is not None and d_tokens is not None:
            embedding_gradient(
                program, inputs.tokens, factors.tokens, scratch.d_x, d_tokens,
                scale=model.architecture.embedding_scale,
            )  # fmt: skip
        if factors.embedding is not None and slices[0].embedding is not None:
            assert inputs.token_order is not None  # since the embedding is adapted
            embedding_lora_gradients(
                program, inputs.tokens, inputs.token_order, factors.embedding, scratch.d_x,
                slices[0].embedding, scale=model.architecture.embedding_scale,
            )  # fmt: skip
    return program, reached


def _cut(
    micro_batch: Program,
    reached: Mapping[int, int],
    layout: AdapterLayout,
    slices: Sequence[Tensor],
) -> tuple[Piece, ...]:
    """A micro-batch's program in pieces.

    Args:
        reached: its commands up to the gradients of each layer.
        slices: of the gradients.
    """
    recording, pieces, first = micro_batch.recording, [], 0
    found = stretches(layout)
    for stretch in found:
        backward, summed = Program(recording), None
        # Commands behind the last gradient, if there were any, belong to the micro-batch, too.
        last = None if stretch is found[-1] else reached[stretch.lowest]
        backward.commands = micro_batch.commands[first:last]
        first = len(micro_batch.commands) if last is None else last
        if len(slices) > 1:
            summed = Program(recording)
            with summed.scope("optimizer"):
                sum_slices(summed, [s.slice(stretch.start, stretch.stop) for s in slices])
        pieces.append(Piece(stretch, backward, summed))
    return tuple(pieces)


def loss_weight_words(
    n_trained: int, loss_scale: float = 1.0, *, again: bool = False
) -> np.ndarray:
    """The uniform of the loss: the f32 bits of loss_scale / n_trained and `again`, u32 [4].

    Args:
        n_trained: tokens of the step that count.
        loss_scale: `TrainingPrograms.loss_scale`.
        again: the step was held (`lora.optim.guard.step_guard`).
    """
    words = [loss_scale / n_trained, float(again), 0.0, 0.0]
    return np.array(words, np.float32).view(np.uint32)
