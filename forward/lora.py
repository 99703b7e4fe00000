"""The low-rank projection z = x · Aᵀ (Hu et al. 2021, "LoRA")."""

from __future__ import annotations

from gguf import GGMLQuantizationType

from forward.activations import activation, check_shape, extent_of
from forward.adapter import LoraFactors
from forward.matmul import record_product
from forward.quantization import QUANTIZATIONS
from forward.weights import MatrixPart
from shaders.program import Program
from shaders.tensor import Tensor


def as_part(matrix: Tensor) -> MatrixPart:
    """An f32 matrix [n, k] in the form of a frozen one, so that the matmul kernels take it."""
    return MatrixPart(QUANTIZATIONS[GGMLQuantizationType.F32], matrix, 0)


def lora_project(
    program: Program,
    x: Tensor,
    lora: LoraFactors,
    *,
    out: Tensor | None = None,
    label: str = "lora_project",
) -> Tensor:  # [rows, members · rank]
    """Appends z = x · Aᵀ for all members that share x in one dispatch.

    Args:
        x: [rows, in_features].
        lora: A [members · rank, in_features].
        out: where to write; a new tensor by default.
    """
    extent = extent_of(x)
    width, in_features = lora.a.shape
    check_shape("lora_project input", x, None, in_features)
    z = out if out is not None else activation(program, extent, width)
    check_shape("lora_project output", z, x.shape[0], width)
    record_product(
        program, extent, x, as_part(lora.a), z, transposed=False, contraction=in_features, label=label
    )
    return z
