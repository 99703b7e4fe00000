"""Gradient of the rotary embedding: the inverse rotation (a rotation is orthogonal)."""

from __future__ import annotations

from lora.forward.rope import rope
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


def rope_backward(
    program: Program,
    d_qkv: Tensor,
    positions: Tensor,
    tables: Tensor,
    *,
    n_rotated_heads: int,
    head_size: int,
    interleaved: bool,
) -> None:
    """Appends the inverse rotation of the first heads of `d_qkv`, in place; see `rope`."""
    rope(
        program,
        d_qkv,
        positions,
        tables,
        n_rotated_heads=n_rotated_heads,
        head_size=head_size,
        interleaved=interleaved,
        inverse=True,
        label="rope_backward",
    )
