"""The gated activation of the feed-forward block (Shazeer 2020, "GLU Variants")."""

from __future__ import annotations

from dataclasses import dataclass

from lora.forward.model.powers import AS_THEY_ARE, LayerPowers
from lora.forward.plans.stretches import Stretches, stretch_constants
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


@dataclass(frozen=True)
class GateAfter:
    """The gated activation of a product; attributes as the arguments of `swiglu`."""

    activation_name: str
    out: Tensor
    powers: LayerPowers = AS_THEY_ARE
    scales_columns = False

    def record(self, program: Program, product: Tensor, stretches: Stretches | None = None) -> None:
        """See `Follower`; the product is written in either case."""
        swiglu(
            program, product, activation_name=self.activation_name, out=self.out,
            stretches=stretches, powers=self.powers,
        )  # fmt: skip

    def adds_up(self, recording: Recording, width: int, splits: int) -> bool:
        """See `Follower`: a lane has a few columns, however many stretches there are."""
        return True


def swiglu(
    program: Program,
    gate_up: Tensor,
    *,
    activation_name: str = "silu",
    out: Tensor | None = None,
    stretches: Stretches | None = None,
    powers: LayerPowers = AS_THEY_ARE,
) -> Tensor:  # [rows, intermediate_size]
    """Appends y = activation(gate) · up.

    Args:
        gate_up: [rows, 2 · intermediate_size], f32 or f16, the gate's columns first.
        activation_name: "silu" (SwiGLU) or "gelu_tanh" (GeGLU).
        out: where to write, f32 or f16; a new f32 tensor by default.
        stretches: where given, gate_up is first written as their sum.
        powers: y = gated · activation(gate of powers · gate) · up.
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
        "gate_power": powers.gate,
        "gated_power": powers.gated,
        **stretch_constants("swiglu", stretches, extent.maximum, 2 * width),
    }
    tensors = [gate_up, y] if stretches is None else [stretches.partial, y, gate_up]
    program.dispatch(
        "swiglu",
        constants | lanes,
        [extent.uniform, *tensors],
        -(-extent.maximum * width // (4 * lanes["lanes"] * lanes["quads"])),
        label="swiglu" if stretches is None else "reduce_swiglu",
    )
    return y
