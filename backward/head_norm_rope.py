"""Gradient of the norm and rotation of query and key heads to their input (weights are frozen)."""

from __future__ import annotations

from lora.backward.rope import rope_backward
from lora.forward.head_norm_rope import (
    check_head_shapes,
    head_constants,
    heads_a_workgroup,
    turns_whole_quads,
)
from lora.forward.heads import Heads, Rotation
from lora.forward.model.norm import HeadNorms
from lora.shaders.activations import check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


def head_norm_rope_backward(
    program: Program,
    qkv: Tensor,
    norms: HeadNorms,
    rotation: Rotation,
    heads: Heads,
    d_qkv: Tensor,
) -> None:
    """Appends the gradient through `head_norm_rope`, in place; v's columns of d_qkv stay.

    Args:
        program: what the dispatch is appended to.
        qkv: [rows, (n_heads + 2 n_kv_heads) · head_size], f32 or f16, what `head_norm_rope` was
            given.
        norms, rotation, heads: as in the forward.
        d_qkv: shaped as qkv, f32 or f16: the gradient to the output becomes that to the input.
    """
    check_head_shapes(qkv, norms, rotation, heads)
    check_shape("head_norm_rope_backward d_qkv", d_qkv, *qkv.shape)
    turning = heads.n_heads + heads.n_kv_heads
    turned = [rotation.positions, rotation.tables]
    if not turns_whole_quads(rotation):
        rope_backward(program, d_qkv, rotation, turning, heads.head_size)
        turned = []
    constants = head_constants(program.recording, norms, rotation, heads)
    extent = extent_of(d_qkv)
    program.dispatch(
        "head_norm_rope_backward",
        constants | {"x_type": qkv.dtype, "out_type": d_qkv.dtype},
        [extent.uniform, qkv, norms.q.weight, norms.k.weight, d_qkv, *turned],
        -(-extent.maximum * turning // heads_a_workgroup(constants)),
    )
