"""Gradients of DoRA's scaling of columns: to the product, and to the magnitudes."""

from __future__ import annotations

from lora.forward.dora import member_constants
from lora.forward.model.factors import LoraFactors
from lora.shaders.activations import check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor

GPU_QUADS, GPU_SPLITS = 16, 16  # of columns in a workgroup; lanes that share one
CPU_QUADS, CPU_SPLITS = 8, 1


def dora_gradient(
    program: Program, d_y: Tensor, p: Tensor, lora: LoraFactors, d_magnitudes: Tensor, out: Tensor
) -> None:
    """Appends out = c ∘ d_y and d_m += Σ_rows d_y ∘ p / ‖W + s · B · A‖.

    Args:
        d_y: [rows, out_features], f32 or f16, the gradient to c ∘ p.
        p: [rows, out_features], x · Wᵀ + s · z · Bᵀ.
        lora: with its `DoraTensors`.
        d_magnitudes: [rows of all members], added to.
        out: as d_y, and not d_y itself.
    """
    rows, width = d_y.shape
    dora = lora.dora
    if dora is None:
        raise ValueError("dora_gradient: these factors have no magnitudes")
    check_shape("dora_gradient p", p, rows, width)
    check_shape("dora_gradient output", out, rows, width)
    check_shape("dora_gradient scales", dora.scales, width)
    check_shape("dora_gradient d_magnitudes", d_magnitudes, lora.b.shape[0])
    if out.dtype != d_y.dtype or width % 4:
        raise ValueError(f"dora_gradient: {out.dtype} of {d_y.dtype}, {width} columns")
    is_cpu = program.recording.facts.is_cpu
    quads, splits = (CPU_QUADS, CPU_SPLITS) if is_cpu else (GPU_QUADS, GPU_SPLITS)
    extent = extent_of(d_y)
    program.dispatch(
        "dora_gradient",
        {
            "width": width,
            "quads": quads,
            "splits": splits,
            "d_y_type": d_y.dtype,
            "p_type": p.dtype,
            "members": member_constants(lora),
        },
        [extent.uniform, d_y, p, dora.scales, dora.inverses, out, d_magnitudes],
        -(-(width // 4) // quads),
    )
