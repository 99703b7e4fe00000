"""Gradient of Qwen3.5's gated DeltaNet as a block of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from lora.backward.before import Before
from lora.backward.causal_conv import causal_conv_backward
from lora.backward.gated_delta import (
    KEY,
    QUERY,
    VALUE,
    DeltaGradients,
    delta_gates_backward,
    gated_delta_backward,
)
from lora.backward.recorder import BackwardRecorder
from lora.backward.span_norm import span_norm_backward
from lora.backward.swiglu import SwigluBefore
from lora.forward.copy_columns import copy_columns
from lora.forward.decoder.delta_block import (
    DeltaActivations,
    convolution_of,
    gates_of,
    length_norm,
    length_spans,
    output_span,
    sizes_of,
)
from lora.forward.model.recurrent_spec import DELTA_NORM, GatedDeltaNet
from lora.forward.part_product import SizedRows
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor


@dataclass(frozen=True)
class DeltaBlockGradients:
    """Gradients of the block's activations.

    Attributes:
        d_mixed: [rows, value_size].
        rule: of the gated delta rule.
        d_inputs: f32 [rows, conv_size], to q, k and v of the rule, then to what was convolved.
        d_projected: [rows, projected_size].
    """

    d_mixed: Tensor
    rule: DeltaGradients
    d_inputs: Tensor
    d_projected: Tensor


def allocate_delta_gradients(
    recording: Recording, spec: GatedDeltaNet, rows: Extent
) -> DeltaBlockGradients:
    """Tensors for up to rows.maximum rows."""

    def tensor(width: int, dtype: str = recording.precision) -> Tensor:
        return recording.memory.empty((rows.maximum, width), dtype, extent=rows)

    return DeltaBlockGradients(
        d_mixed=tensor(spec.value_size),
        rule=DeltaGradients.allocate(recording, sizes_of(spec), rows),
        d_inputs=tensor(spec.conv_size, "f32"),
        d_projected=tensor(spec.projected_size),
    )


def _sum_of_heads(
    program: Program, spec: GatedDeltaNet, d_deltas: Tensor, d_inputs: Tensor
) -> None:
    """Appends: the value heads that share a key head add up what q and k get."""
    values, keys = spec.value_size, spec.key_size
    for part, to in ((QUERY, 0), (KEY, keys)):
        for number in range(spec.value_heads // spec.key_heads):
            copy_columns(
                program, d_deltas, part * values + number * keys, d_inputs, to, keys,
                accumulate=number > 0, label="shared_heads_backward",
            )  # fmt: skip
    copy_columns(program, d_deltas, VALUE * values, d_inputs, 2 * keys, values, label="d_v")


def record_delta_backward(
    layer: BackwardRecorder, spec: GatedDeltaNet, act: DeltaActivations, normed: Tensor,
    d_output: SizedRows, before: Before,
) -> bool:  # fmt: skip
    """Appends the block's backward; see `BlockBackward`. act.gated is overwritten."""
    program, weights, segments = layer.program, layer.weights, layer.shared.inputs.segments
    scratch: DeltaBlockGradients = layer.scratch(spec)
    gate = SwigluBefore(act.gated)
    if not layer.through("delta_out", act.mixed, d_output, scratch.d_mixed, gate):
        return False
    d_gated = act.gated
    copy_columns(
        program, d_gated, 0, scratch.d_projected, spec.conv_size, spec.value_size, label="d_z"
    )
    span_norm_backward(
        program, act.rule.deltas, weights.vectors[DELTA_NORM], weights.spec.norm_epsilon,
        [output_span(spec)], d_gated, scratch.rule.d_deltas,
    )  # fmt: skip
    gated_delta_backward(program, act.rule, sizes_of(spec), segments, scratch.rule)
    _sum_of_heads(program, spec, scratch.rule.d_deltas, scratch.d_inputs)
    weight, epsilon = length_norm(spec, weights)
    span_norm_backward(
        program, act.convolved, weight, epsilon, length_spans(spec)[:2], scratch.d_inputs,
        scratch.d_inputs,
    )  # fmt: skip
    causal_conv_backward(
        program, act.projected, convolution_of(weights), segments, scratch.d_inputs,
        scratch.d_projected,
    )  # fmt: skip
    delta_gates_backward(
        program, act.projected, spec.gates_at, gates_of(weights), sizes_of(spec),
        scratch.rule.d_gates, scratch.d_projected,
    )  # fmt: skip
    return layer.through(
        "delta_in", normed, scratch.d_projected, layer.shared.scratch.d_normed, before
    )
