"""Gradient of the norm and rotation of query and key heads to their input (weights are frozen)."""

from __future__ import annotations

from lora.backward.rope import rope_backward
from lora.forward.head_norm_rope import (
    check_head_shapes,
    head_constants,
    heads_a_workgroup,
    turns_whole_quads,
)
from lora.shaders.activations import check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


def head_norm_rope_backward(
    program: Program,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    epsilon: float,
    positions: Tensor,
    tables: Tensor,
    d_qkv: Tensor,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_size: int,
    interleaved: bool,
) -> None:
    """Appends the gradient through `head_norm_rope`, in place; v's columns of d_qkv stay.

    Args:
        program: what the dispatch is appended to.
        qkv: [rows, (n_heads + 2 n_kv_heads) · head_size], f32 or f16, what `head_norm_rope` was
            given.
        q_weight: [head_size].
        k_weight: [head_size].
        epsilon: as in the forward.
        positions: as in the forward.
        tables: as in the forward.
        d_qkv: shaped as qkv, f32 or f16: the gradient to the output becomes that to the input.
        n_heads: query heads.
        n_kv_heads: key heads, and as many value heads.
        head_size: columns of a head.
        interleaved: as in the forward.
    """
    check_head_shapes(qkv, q_weight, k_weight, positions, tables, n_heads, n_kv_heads, head_size)
    check_shape("head_norm_rope_backward d_qkv", d_qkv, *qkv.shape)
    together = turns_whole_quads(tables, interleaved)
    if not together:
        rope_backward(
            program, d_qkv, positions, tables, n_rotated_heads=n_heads + n_kv_heads,
            head_size=head_size, interleaved=interleaved,
        )  # fmt: skip
    constants = head_constants(
        program.recording, tables.shape[1] if together else 0, epsilon, n_heads, n_kv_heads,
        head_size, interleaved,
    )  # fmt: skip
    extent = extent_of(d_qkv)
    program.dispatch(
        "head_norm_rope_backward",
        constants | {"x_type": qkv.dtype, "out_type": d_qkv.dtype},
        [
            extent.uniform, qkv, q_weight, k_weight, d_qkv,
            *([positions, tables] if together else []),
        ],
        -(-extent.maximum * (n_heads + n_kv_heads) // heads_a_workgroup(constants)),
    )  # fmt: skip
