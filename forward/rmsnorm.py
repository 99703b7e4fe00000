"""RMSNorm (Zhang & Sennrich 2019, "Root Mean Square Layer Normalization")."""

from __future__ import annotations

from forward.activations import activation, check_shape, extent_of
from shaders.device import Device
from shaders.program import Program
from shaders.tensor import Tensor

# Fewest lanes a row, and quads of columns a lane until there are more lanes. A GPU waits for
# memory: few quads, all loaded at once. An adapter on the CPU runs 8 lanes as one vector and pays
# for each vector that meets a barrier; past 16 quads its compiler takes seconds.
GPU_LANES, GPU_QUADS = 64, 4
CPU_LANES, CPU_QUADS = 16, 16
_MOST_LANES = 256  # of a workgroup, on every device


def row_lanes(device: Device, width: int) -> int:
    """Lanes of the workgroup that norms one row of `width` columns."""
    if width % 4:
        raise ValueError(f"rmsnorm: a width of {width} is no multiple of 4")
    lanes, quads = (CPU_LANES, CPU_QUADS) if device.is_cpu else (GPU_LANES, GPU_QUADS)
    while lanes < _MOST_LANES and 4 * quads * lanes < width:
        lanes *= 2
    return lanes


def rmsnorm(
    program: Program,
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:  # [rows, width]
    """Appends y = x / sqrt(mean(x²) + epsilon) · weight + residual, row by row.

    Args:
        x: [rows, width], f32 or f16, width a multiple of 4.
        weight: [width], as the GGUF holds it (Gemma's + 1 included).
        epsilon: added to the mean square.
        residual: f32 [rows, width], added where given; not the tensor `out`.
        out: where to write, f32 or f16; a new f32 tensor by default.
    """
    width = x.shape[1]
    check_shape("rmsnorm weight", weight, width)
    extent = extent_of(x)
    y = out if out is not None else activation(program, extent, width)
    check_shape("rmsnorm output", y, x.shape[0], width)
    tensors = [extent.uniform, x, weight, y]
    if residual is not None:
        check_shape("rmsnorm residual", residual, x.shape[0], width)
        tensors.append(residual)
    constants = {
        "width": width,
        "x_type": x.dtype,
        "out_type": y.dtype,
        "lanes": row_lanes(program.device, width),
        "epsilon": epsilon,
        "residual": residual is not None,
    }
    program.dispatch("rmsnorm", constants, tensors, extent.maximum)
    return y
