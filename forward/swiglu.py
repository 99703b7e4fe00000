"""The gated activation of the feed-forward block (Shazeer 2020, "GLU Variants")."""

from __future__ import annotations

from lora.shaders.activations import activation, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

# Lanes of a workgroup, and quads of columns that a lane takes.
GPU_LANES, GPU_QUADS = 128, 1
CPU_LANES, CPU_QUADS = 64, 1

ACTIVATIONS = ("silu", "gelu_tanh")


def check_activation(name: str) -> None:
    """Refuses an activation that no kernel knows."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is none of {', '.join(ACTIVATIONS)}")


def gated_width(gate_up: Tensor) -> int:
    """The intermediate_size of gate and up side by side; the kernels take four columns at once."""
    columns = gate_up.shape[1]
    if columns % 8:
        raise ValueError(f"swiglu: half of gate_up's {columns} columns is no multiple of 4")
    return columns // 2


def lane_constants(recording: Recording) -> dict[str, int]:
    """The template constants that forward and backward share."""
    lanes, quads = (CPU_LANES, CPU_QUADS) if recording.facts.is_cpu else (GPU_LANES, GPU_QUADS)
    return {"lanes": lanes, "quads": quads}


def swiglu(
    program: Program, gate_up: Tensor, *, activation_name: str = "silu", out: Tensor | None = None
) -> Tensor:  # [rows, intermediate_size]
    """Appends y = activation(gate) · up.

    Args:
        gate_up: [rows, 2 · intermediate_size], f32 or f16, the gate's columns first.
        activation_name: "silu" (SwiGLU) or "gelu_tanh" (GeGLU).
        out: where to write, f32 or f16; a new f32 tensor by default.
    """
    check_activation(activation_name)
    extent = extent_of(gate_up)
    width = gated_width(gate_up)
    y = out if out is not None else activation(program, extent, width)
    check_shape("swiglu output", y, gate_up.shape[0], width)
    lanes = lane_constants(program.recording)
    constants = {
        "width": width,
        "activation": activation_name,
        "x_type": gate_up.dtype,
        "out_type": y.dtype,
    }
    program.dispatch(
        "swiglu",
        constants | lanes,
        [extent.uniform, gate_up, y],
        -(-extent.maximum * width // (4 * lanes["lanes"] * lanes["quads"])),
    )
    return y
