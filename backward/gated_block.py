"""Gradient of the dense gated feed-forward."""

from __future__ import annotations

from lora.backward.before import Before
from lora.backward.recorder import BackwardRecorder
from lora.backward.swiglu import SwigluBefore
from lora.forward.decoder.gated_block import GatedActivations
from lora.forward.model.layer_spec import GatedFeedForward
from lora.forward.part_product import SizedRows
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor


def allocate_gated_gradient(recording: Recording, spec: GatedFeedForward, rows: Extent) -> Tensor:
    """The gradient to what down is given, [rows, intermediate_size]."""
    shape = (rows.maximum, spec.intermediate_size)
    return recording.memory.empty(shape, recording.precision, extent=rows)


def record_gated_backward(
    layer: BackwardRecorder, spec: GatedFeedForward, act: GatedActivations, normed: Tensor,
    d_output: SizedRows, before: Before,
) -> bool:  # fmt: skip
    """Appends the block's backward; see `BlockBackward`. act.gate_up is overwritten."""
    gate = SwigluBefore(act.gate_up, spec.activation, layer.weights.powers)
    if not layer.through("down", act.gated, d_output, layer.scratch(spec), gate):
        return False
    return layer.through("gate_up", normed, act.gate_up, layer.shared.scratch.d_normed, before)
