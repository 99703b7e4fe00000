"""Gradient of the gate of a layer's own input; that input is frozen."""

from __future__ import annotations

from lora.forward.per_layer import gate_constants
from lora.shaders.activations import check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


def per_layer_gate_backward(
    program: Program, gate: Tensor, inputs: Tensor, first: int, activation: str, d_y: Tensor
) -> None:
    """Appends gate ← the gradient of `per_layer_gate` to its gate.

    Args:
        program: what the dispatch is appended to.
        gate: [rows, size], f32 or f16: what the forward was given, overwritten.
        inputs, first, activation: as in the forward.
        d_y: [rows, size], f32 or f16.
    """
    check_shape("per_layer_gate_backward d_y", d_y, *gate.shape)
    constants = gate_constants(gate, inputs, first, activation) | {"d_y_type": d_y.dtype}
    extent = extent_of(gate)
    place = program.recording.memory.constant_uniform((first // 4,))
    tensors = [extent.uniform, gate, inputs, d_y, place]
    n_groups = -(-extent.maximum * gate.shape[1] // 256)
    program.dispatch("per_layer_gate_backward", constants, tensors, n_groups)
