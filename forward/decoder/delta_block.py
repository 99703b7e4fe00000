"""Qwen3.5's gated DeltaNet as a block of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from lora.forward.causal_conv import Convolution, causal_conv, causal_conv_text
from lora.forward.copy_columns import copy_columns
from lora.forward.decoder.recorder import AfterCache, BlockEnd, LayerRecorder
from lora.forward.decoder.row_recorder import Row, RowEnd, RowRecorder
from lora.forward.decoder.step_inputs import StepInputs
from lora.forward.gated_delta import (
    DeltaSizes,
    DeltaTensors,
    GateWeights,
    delta_gates,
    gated_delta,
    gated_delta_row,
    gated_delta_text,
)
from lora.forward.int_row import to_int_row
from lora.forward.model.frozen_model import LayerWeights
from lora.forward.model.kv_cache import TextState
from lora.forward.model.recurrent_spec import (
    DELTA_CONV,
    DELTA_DECAY,
    DELTA_NORM,
    DELTA_STEP,
    UNIT_LENGTH,
    GatedDeltaNet,
)
from lora.forward.span_norm import Span, span_norm
from lora.forward.swiglu import swiglu
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor

_LENGTH_EPSILON = 1e-6  # added to the sum of squares under a length; transformers' own


@dataclass(frozen=True)
class DeltaActivations:
    """What the block computes.

    Attributes:
        projected: [rows, projected_size]: q, k, v, z, b and alpha.
        convolved: [rows, conv_size].
        rule: of the gated delta rule.
        gated: [rows, 2 · value_size]: z, and what comes out of the rule, normed.
        mixed: [rows, value_size], what the last product takes.
    """

    projected: Tensor
    convolved: Tensor
    rule: DeltaTensors
    gated: Tensor
    mixed: Tensor


def sizes_of(spec: GatedDeltaNet) -> DeltaSizes:
    """Sizes of the rule."""
    return DeltaSizes(spec.key_heads, spec.value_heads, spec.head_size)


def allocate_delta(
    recording: Recording,
    spec: GatedDeltaNet,
    rows: Extent,
    shared: DeltaActivations | None = None,
) -> DeltaActivations:
    """Tensors for up to rows.maximum rows; `mixed` may be shared."""

    def tensor(width: int) -> Tensor:
        return recording.memory.empty((rows.maximum, width), recording.precision, extent=rows)

    return DeltaActivations(
        projected=tensor(spec.projected_size),
        convolved=tensor(spec.conv_size),
        rule=DeltaTensors.allocate(recording, sizes_of(spec), rows),
        gated=tensor(2 * spec.value_size),
        mixed=tensor(spec.value_size) if shared is None else shared.mixed,
    )


def allocate_delta_state(recording: Recording, spec: GatedDeltaNet, room: int) -> TextState:
    """What the rows of a text leave for those after them, however long it is."""
    shapes = (spec.taps - 1, spec.conv_size), sizes_of(spec).state_shape
    return TextState(
        tuple(recording.memory.empty(shape, purpose="key-value cache") for shape in shapes)
    )


def convolution_of(weights: LayerWeights) -> Convolution:
    """The convolution of a layer."""
    return Convolution(weights.vectors[DELTA_CONV], gated=False)


def gates_of(weights: LayerWeights) -> GateWeights:
    """What a layer's gates are made with."""
    return GateWeights(weights.vectors[DELTA_DECAY], weights.vectors[DELTA_STEP])


def length_norm(spec: GatedDeltaNet, weights: LayerWeights) -> tuple[Tensor, float]:
    """Weight and epsilon with which RMSNorm divides by a length: x / sqrt(Σ x² + epsilon)."""
    return weights.vectors[UNIT_LENGTH], _LENGTH_EPSILON / spec.head_size


def length_spans(spec: GatedDeltaNet) -> tuple[Span, Span, Span]:
    """q, k and v as stretches of a row; v is taken as it is."""
    n, keys = spec.head_size, spec.key_size
    return (
        Span(spec.key_heads, n, 0, 0, 0),
        Span(spec.key_heads, n, keys, keys, n),
        Span(spec.value_heads, n, 2 * keys, 2 * keys, None, normed=False),
    )


def output_span(spec: GatedDeltaNet) -> Span:
    """What comes out of the rule, by heads, beside z."""
    return Span(spec.value_heads, spec.head_size, 0, spec.value_size, 0)


def _prepare(
    program: Program, weights: LayerWeights, spec: GatedDeltaNet, act: DeltaActivations
) -> None:
    """Appends what the rule takes of what was convolved, and of the product."""
    weight, epsilon = length_norm(spec, weights)
    span_norm(program, act.convolved, weight, epsilon, length_spans(spec), act.rule.inputs)
    delta_gates(
        program, act.projected, spec.gates_at, gates_of(weights), sizes_of(spec), act.rule.inputs
    )


def _finish(
    program: Program, weights: LayerWeights, spec: GatedDeltaNet, act: DeltaActivations
) -> None:
    """Appends the norm of what comes out of the rule, and its gate."""
    copy_columns(program, act.projected, spec.conv_size, act.gated, 0, spec.value_size, label="z")
    span_norm(
        program, act.rule.deltas, weights.vectors[DELTA_NORM], weights.spec.norm_epsilon,
        [output_span(spec)], act.gated,
    )  # fmt: skip
    swiglu(program, act.gated, out=act.mixed)


def _of_text(
    program: Program, weights: LayerWeights, spec: GatedDeltaNet, act: DeltaActivations,
    inputs: StepInputs, cache: TextState,
) -> None:  # fmt: skip
    """Appends all between the products, for new rows of a text."""
    taps, state = cache.tensors
    convolution, sizes = convolution_of(weights), sizes_of(spec)
    causal_conv_text(program, act.projected, convolution, inputs.positions, taps, act.convolved)
    _prepare(program, weights, spec, act)
    if inputs.rows.maximum == 1:
        gated_delta_row(program, act.rule.inputs, sizes, inputs.positions, state, act.rule.deltas)
    else:
        gated_delta_text(program, act.rule, sizes, inputs.positions, state)
    _finish(program, weights, spec, act)


def record_delta(
    layer: LayerRecorder, spec: GatedDeltaNet, act: DeltaActivations, normed: Tensor, end: BlockEnd
) -> None:
    """Appends the block, of `normed` [rows, hidden_size]."""
    program, context, weights = layer.program, layer.walk.context, layer.weights
    layer.product(normed, "delta_in", act.projected)
    if isinstance(context, AfterCache):
        cache = context.caches[layer.layer]
        _of_text(program, weights, spec, act, context.inputs, cache)
    else:
        causal_conv(
            program, act.projected, convolution_of(weights), context.segments, act.convolved
        )
        _prepare(program, weights, spec, act)
        gated_delta(program, act.rule, sizes_of(spec), context.segments)
        _finish(program, weights, spec, act)
    layer.end(act.mixed, "delta_out", end)


def record_delta_row(
    layer: RowRecorder, spec: GatedDeltaNet, act: DeltaActivations, row: Row, end: RowEnd
) -> None:
    """Appends the block for one new token on a GPU."""
    layer.product(row, "delta_in", act.projected)
    _of_text(layer.program, layer.weights, spec, act, layer.inputs, layer.cache)
    mixed = layer.before("mixed", act.mixed, "delta_out")
    if mixed.ints is not None:
        to_int_row(layer.program, act.mixed, mixed.ints)
    layer.end(mixed, "delta_out", end)
