"""Gradient of the rotary embedding: the inverse rotation (a rotation is orthogonal)."""

from __future__ import annotations

from lora.forward.heads import Rotation
from lora.forward.rope import HeadSums, rope
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


def rope_backward(
    program: Program,
    d_qkv: Tensor,
    rotation: Rotation,
    n_rotated_heads: int,
    head_size: int,
    *,
    sums: HeadSums | None = None,
) -> None:
    """Appends the inverse rotation of the first heads of `d_qkv`, in place; see `rope`."""
    rope(program, d_qkv, rotation, n_rotated_heads, head_size, inverse=True, source=sums)
