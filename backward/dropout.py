"""Gradient to what dropout was given before the low-rank factors."""

from __future__ import annotations

from lora.forward.dropout import GroupDropout
from lora.forward.model.factors import LoraFactors
from lora.shaders.activations import check_f32, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor

GPU_LANES, GPU_ROWS = 64, 8
CPU_LANES, CPU_ROWS = 8, 4


def dropout_input_gradient(
    program: Program,
    d_z: Tensor,
    lora: LoraFactors,
    dropout: GroupDropout,
    *,
    out: Tensor,
    accumulate: bool = False,
) -> None:
    """Appends out (+)= Σ_g mask_g ∘ (d_z_g · A_g) / (1 − p), members in order.

    Args:
        d_z: [rows, members · rank], the gradient to z.
        lora: A [members · rank, in_features].
        out: [rows, in_features], f32 or f16.
        accumulate: add to what `out` holds.
    """
    width = lora.a.shape[1]
    extent = extent_of(d_z)
    check_shape("dropout_input_gradient d_z", d_z, None, lora.n_members * lora.rank)
    check_shape("dropout_input_gradient output", out, d_z.shape[0], width)
    check_shape("dropout_input_gradient keys", dropout.rows, d_z.shape[0])
    check_f32("dropout_input_gradient", d_z=d_z, factor=lora.a)
    is_cpu = program.recording.facts.is_cpu
    lanes, lane_rows = (CPU_LANES, CPU_ROWS) if is_cpu else (GPU_LANES, GPU_ROWS)
    program.dispatch(
        "dropout_input_gradient",
        {
            "lanes": lanes,
            "lane_rows": lane_rows,
            "members": lora.n_members,
            "rank": lora.rank,
            "width": width,
            "out_type": out.dtype,
            "accumulate": accumulate,
            "scale": dropout.scale,
            "dropout": dropout.constants,
        },
        [extent.uniform, dropout.matrices, dropout.rows, d_z, lora.a, out],
        -(-extent.maximum // lane_rows) * -(-(width // 4) // lanes),
        label="dropout_backward",
        flops=2 * extent.maximum * lora.a.size,
    )
