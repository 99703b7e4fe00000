"""RMSNorm (Zhang & Sennrich 2019, "Root Mean Square Layer Normalization")."""

from __future__ import annotations

from forward.activations import activation, check_shape, extent_of
from shaders.program import Program
from shaders.tensor import Tensor


def rmsnorm(
    program: Program, x: Tensor, weight: Tensor, epsilon: float, *, out: Tensor | None = None
) -> Tensor:  # [rows, width]
    """Appends y = x / sqrt(mean(x²) + epsilon) · weight, row by row.

    Args:
        x: [rows, width].
        weight: [width], as the GGUF holds it (Gemma's + 1 included).
        epsilon: added to the mean square.
        out: where to write; a new tensor by default.
    """
    width = x.shape[1]
    check_shape("rmsnorm weight", weight, width)
    extent = extent_of(x)
    y = out if out is not None else activation(program, extent, width)
    check_shape("rmsnorm output", y, x.shape[0], width)
    program.dispatch(
        "rmsnorm",
        {"width": width, "epsilon": epsilon},
        [extent.uniform, x, weight, y],
        extent.maximum,
    )
    return y
