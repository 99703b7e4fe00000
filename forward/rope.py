"""Rotary position embedding (Su et al. 2021, "RoFormer")."""

from __future__ import annotations

from lora.forward.heads import Rotation
from lora.shaders.activations import check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor

GPU_LANES, CPU_LANES = 64, 64  # of a workgroup


def rope(
    program: Program,
    qkv: Tensor,
    rotation: Rotation,
    n_rotated_heads: int,
    head_size: int,
    *,
    inverse: bool = False,
    label: str = "rope",
) -> None:
    """Appends the rotation of the first heads of `qkv`, in place.

    Args:
        qkv: [rows, any width], f32 or f16: q heads, k heads, v heads.
        rotation: each row by its position in its example.
        n_rotated_heads: q and k heads together; what follows them is left alone.
        head_size: columns of a head; only its first rope_dimensions turn.
        inverse: turn back (the backward pass).
    """
    extent, positions, tables = extent_of(qkv), rotation.positions, rotation.tables
    check_shape("rope positions", positions, qkv.shape[0])
    check_shape("rope tables", tables, None, None, 2)
    half = tables.shape[1]
    if 2 * half > head_size or n_rotated_heads * head_size > qkv.shape[1]:
        raise ValueError(
            f"rope: {n_rotated_heads} heads of {head_size} with {2 * half} rotated columns "
            f"do not fit {qkv.shape}"
        )
    # Four pairs a lane as whole vectors, where heads and their rotated halves are made of these.
    unit = 4 if half % 4 == head_size % 4 == qkv.shape[1] % 4 == 0 else 1
    lanes = CPU_LANES if program.recording.facts.is_cpu else GPU_LANES
    constants = {
        "unit": unit,
        "qkv_type": qkv.dtype,
        "lanes": lanes,
        "half": half,
        "n_rotated_heads": n_rotated_heads,
        "head_size": head_size,
        "stride": qkv.shape[1],
        "interleaved": rotation.interleaved,
        "inverse": inverse,
    }
    n_lanes = extent.maximum * half // unit * n_rotated_heads
    tensors = [extent.uniform, qkv, positions, tables]
    program.dispatch("rope", constants, tensors, -(-n_lanes // lanes), label=label)
