"""Gradient of the gated activation."""

from __future__ import annotations

from dataclasses import dataclass

from lora.backward.before import SourceBefore
from lora.forward.model.powers import AS_THEY_ARE, LayerPowers
from lora.forward.plans.stretches import Stretches, stretch_constants
from lora.forward.swiglu import (
    check_activation,
    gated_width,
    lane_constants,
    swiglu,
)
from lora.shaders.activations import activation, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor


@dataclass(frozen=True)
class SwigluBefore(SourceBefore):
    """The gated activation before a product; `gate_up` becomes its own gradient.

    Attributes:
        gate_up, activation_name, powers: as arguments of `swiglu_backward`.
    """

    gate_up: Tensor
    activation_name: str = "silu"
    powers: LayerPowers = AS_THEY_ARE

    def record(self, program: Program, product: Tensor, stretches: Stretches | None = None) -> None:
        """See `SourceBefore`."""
        swiglu_backward(
            program, self.gate_up, product, activation_name=self.activation_name,
            out=self.gate_up, gated=self.again, stretches=stretches, powers=self.powers,
        )  # fmt: skip

    def adds_up(self, recording: Recording, width: int, splits: int) -> bool:
        """See `lora.forward.plans.stretches.Follower`, as of `GateAfter`."""
        return True

    def repeat(self, program: Program, out: Tensor) -> None:
        """See `SourceBefore`."""
        swiglu(
            program, self.gate_up, activation_name=self.activation_name, out=out, powers=self.powers
        )


def swiglu_backward(
    program: Program,
    gate_up: Tensor,
    d_y: Tensor,
    *,
    activation_name: str = "silu",
    out: Tensor | None = None,
    gated: Tensor | None = None,
    stretches: Stretches | None = None,
    powers: LayerPowers = AS_THEY_ARE,
) -> Tensor:  # [rows, 2 · intermediate_size]
    """Appends the gradient to gate and up.

    Args:
        gate_up: [rows, 2 · intermediate_size], f32 or f16, what the forward was given.
        d_y: [rows, intermediate_size], f32 or f16.
        activation_name: as in the forward.
        out: where to write, f32 or f16, `gate_up` itself included; a new f32 tensor by default.
        gated: [rows, intermediate_size], f32 or f16; where given, what the forward gave is written
            there again, to the bits of `swiglu`.
        stretches: where given, d_y is their sum, rounded as d_y would hold it, and d_y itself is
            neither read nor written.
        powers: as in the forward.
    """
    check_activation(activation_name)
    extent = extent_of(gate_up)
    width = gated_width(gate_up)
    check_shape("swiglu_backward d_y", d_y, gate_up.shape[0], width)
    d_gate_up = out if out is not None else activation(program, extent, 2 * width)
    check_shape("swiglu_backward output", d_gate_up, *gate_up.shape)
    in_place = d_gate_up.buffer is gate_up.buffer
    if in_place and d_gate_up.offset != gate_up.offset:
        raise ValueError("swiglu_backward: the output is another range of gate_up's buffer")
    source = d_y if stretches is None else stretches.partial
    tensors = [extent.uniform, source, d_gate_up, *([] if in_place else [gate_up])]
    if gated is not None:
        check_shape("swiglu_backward gated", gated, gate_up.shape[0], width)
        tensors.append(gated)
    lanes = lane_constants(program.recording)
    constants = {
        "width": width,
        "activation": activation_name,
        "x_type": gate_up.dtype,
        "d_y_type": d_y.dtype,
        "out_type": d_gate_up.dtype,
        "in_place": in_place,
        "gated_type": None if gated is None else gated.dtype,
        "gate_power": powers.gate,
        "gated_power": powers.gated,
        **stretch_constants("swiglu_backward", stretches, extent.maximum, width),
    }
    program.dispatch(
        "swiglu_backward",
        constants | lanes,
        tensors,
        -(-extent.maximum * width // (4 * lanes["lanes"] * lanes["quads"])),
        label="swiglu_backward" if stretches is None else "reduce_swiglu_backward",
    )
    return d_gate_up
