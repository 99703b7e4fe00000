"""What a token has for every layer beside its embedding (Gemma 3n and 4)."""

from __future__ import annotations

from typing import Any

from lora.forward.model.norm import Norm
from lora.forward.rmsnorm import row_lanes
from lora.forward.swiglu import check_activation
from lora.shaders.activations import check_f32, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


def per_layer_inputs(
    program: Program, projected: Tensor, norm: Norm, table: Tensor, scale: float
) -> None:
    """Appends y ← (norm(y) + scale · table) / √2, in place, each layer's columns on their own.

    Args:
        program: what the dispatch is appended to.
        projected: y [rows, layers · size], f32 or f16: the embeddings' projection.
        norm: of `size` columns.
        table: f32 [rows, layers · size]: the tokens' rows.
        scale: of these.
    """
    size, width = norm.weight.shape[0], projected.shape[1]
    check_f32("per_layer_inputs", weight=norm.weight, table=table)
    check_shape("per_layer_inputs table", table, *projected.shape)
    if width % size or size % 4:
        raise ValueError(f"per_layer_inputs: {width} columns are no layers of {size}")
    extent = extent_of(projected)
    constants = {
        "y_type": projected.dtype,
        "quads": size // 4,
        "n_layers": width // size,
        "epsilon": norm.epsilon,
        "scale": float(scale),
        "lanes": row_lanes(program.recording, size),
    }
    program.dispatch(
        "per_layer_inputs",
        constants,
        [extent.uniform, projected, norm.weight, table],
        extent.maximum * width // size,
    )


def per_layer_gate(
    program: Program, gate: Tensor, inputs: Tensor, first: int, activation: str, out: Tensor
) -> None:
    """Appends y = activation(gate) · inputs[:, first : first + size].

    Args:
        program: what the dispatch is appended to.
        gate: [rows, size], f32 or f16.
        inputs: [rows, any width], f32 or f16.
        first: the first column of inputs; a multiple of 4.
        activation: a name of forward/swiglu.py.
        out: [rows, size], f32 or f16; not gate.
    """
    check_shape("per_layer_gate output", out, *gate.shape)
    constants = gate_constants(gate, inputs, first, activation) | {"y_type": out.dtype}
    extent = extent_of(gate)
    place = program.recording.memory.constant_uniform((first // 4,))
    tensors = [extent.uniform, gate, inputs, out, place]
    n_groups = -(-extent.maximum * gate.shape[1] // 256)
    program.dispatch("per_layer_gate", constants, tensors, n_groups)


def gate_constants(gate: Tensor, inputs: Tensor, first: int, activation: str) -> dict[str, Any]:
    """The template constants that forward and backward share, once shapes fit."""
    check_activation(activation)
    check_shape("per_layer_gate inputs", inputs, gate.shape[0], None)
    size, width = gate.shape[1], inputs.shape[1]
    if size % 4 or first % 4 or width % 4 or first + size > width:
        raise ValueError(f"per_layer_gate: {size} columns from {first} on, of {width}: do not fit")
    return {
        "x_type": gate.dtype,
        "input_type": inputs.dtype,
        "quads": size // 4,
        "stride": width // 4,
        "activation": activation,
    }
