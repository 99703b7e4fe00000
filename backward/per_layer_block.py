"""Gradient of a layer's own input as a block."""

from __future__ import annotations

from lora.backward.before import Before
from lora.backward.per_layer import PerLayerGateBefore
from lora.backward.recorder import BackwardRecorder
from lora.forward.decoder.per_layer_block import PerLayerActivations
from lora.forward.model.layer_spec import PerLayerInput
from lora.forward.part_product import SizedRows
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor


def allocate_per_layer_gradient(recording: Recording, spec: PerLayerInput, rows: Extent) -> Tensor:
    """The gradient to what the gate gives, [rows, size]."""
    return recording.memory.empty((rows.maximum, spec.size), recording.precision, extent=rows)


def record_per_layer_backward(
    layer: BackwardRecorder, spec: PerLayerInput, act: PerLayerActivations, source: Tensor,
    d_output: SizedRows, before: Before,
) -> bool:  # fmt: skip
    """Appends the block's backward; see `BlockBackward`. act.gate is overwritten."""
    inputs = layer.shared.per_layer
    assert inputs is not None  # as the model has such
    gate = PerLayerGateBefore(act.gate, inputs, spec.layer * spec.size, spec.activation)
    if not layer.through("proj", act.gated, d_output, layer.scratch(spec), gate):
        return False
    return layer.through("inp_gate", source, act.gate, layer.shared.scratch.d_normed, before)
