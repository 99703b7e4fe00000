"""Gradient of the gated activation."""

from __future__ import annotations

from forward.activations import activation, check_shape, extent_of
from forward.swiglu import check_activation, gated_width, lane_constants
from shaders.program import Program
from shaders.tensor import Tensor


def swiglu_backward(
    program: Program,
    gate_up: Tensor,
    d_y: Tensor,
    *,
    activation_name: str = "silu",
    out: Tensor | None = None,
) -> Tensor:  # [rows, 2 · intermediate_size]
    """Appends the gradient to gate and up.

    Args:
        gate_up: [rows, 2 · intermediate_size], what the forward was given.
        d_y: [rows, intermediate_size].
        activation_name: as in the forward.
        out: where to write, `gate_up` itself included; a new tensor by default.
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
    tensors = [extent.uniform, d_y, d_gate_up, *([] if in_place else [gate_up])]
    lanes = lane_constants(program.device)
    program.dispatch(
        "swiglu_backward",
        {"width": width, "activation": activation_name, "in_place": in_place, **lanes},
        tensors,
        -(-extent.maximum * width // (4 * lanes["lanes"] * lanes["quads"])),
    )
    return d_gate_up
