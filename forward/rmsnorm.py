"""RMSNorm (Zhang & Sennrich 2019, "Root Mean Square Layer Normalization")."""

from __future__ import annotations

from forward.activations import activation, check_shape, extent_of
from shaders.program import Program
from shaders.tensor import Tensor


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
        x: [rows, width].
        weight: [width], as the GGUF holds it (Gemma's + 1 included).
        epsilon: added to the mean square.
        residual: [rows, width], added where given; not the tensor `out`.
        out: where to write; a new tensor by default.
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
    constants = {"width": width, "epsilon": epsilon, "residual": residual is not None}
    program.dispatch("rmsnorm", constants, tensors, extent.maximum)
    return y
