"""Gradient of the gate of a layer's own input; that input is frozen."""

from __future__ import annotations

from dataclasses import dataclass

from lora.backward.before import SourceBefore
from lora.forward.per_layer import gate_constants, per_layer_gate
from lora.forward.plans.stretches import Stretches
from lora.shaders.activations import check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


@dataclass(frozen=True)
class PerLayerGateBefore(SourceBefore):
    """The gate before a product; attributes as arguments of `per_layer_gate_backward`."""

    gate: Tensor
    inputs: Tensor
    first: int
    activation: str

    def record(self, program: Program, product: Tensor, stretches: Stretches | None = None) -> None:
        """See `SourceBefore`."""
        per_layer_gate_backward(
            program, self.gate, self.inputs, self.first, self.activation, product, gated=self.again
        )

    def repeat(self, program: Program, out: Tensor) -> None:
        """See `SourceBefore`."""
        per_layer_gate(program, self.gate, self.inputs, self.first, self.activation, out)


def per_layer_gate_backward(
    program: Program, gate: Tensor, inputs: Tensor, first: int, activation: str, d_y: Tensor,
    *, gated: Tensor | None = None,
) -> None:  # fmt: skip
    """Appends gate ← the gradient of `per_layer_gate` to its gate.

    Args:
        program: what the dispatch is appended to.
        gate: [rows, size], f32 or f16: what the forward was given, overwritten.
        inputs, first, activation: as in the forward.
        d_y: [rows, size], f32 or f16.
        gated: [rows, size], f32 or f16; where given, what the forward gave is written there again,
            to the bits of `per_layer_gate`.
    """
    check_shape("per_layer_gate_backward d_y", d_y, *gate.shape)
    constants = gate_constants(gate, inputs, first, activation) | {
        "d_y_type": d_y.dtype, "gated_type": None if gated is None else gated.dtype,
    }  # fmt: skip
    extent = extent_of(gate)
    place = program.recording.memory.constant_uniform((first // 4,))
    tensors = [extent.uniform, gate, inputs, d_y, place]
    if gated is not None:
        check_shape("per_layer_gate_backward gated", gated, *gate.shape)
        tensors.append(gated)
    n_groups = -(-extent.maximum * gate.shape[1] // 256)
    program.dispatch("per_layer_gate_backward", constants, tensors, n_groups)
