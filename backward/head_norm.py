"""Gradient of the norm of query and key heads to its input (its weights are frozen)."""

from __future__ import annotations

from forward.activations import check_shape, extent_of
from forward.head_norm import head_norm_constants, heads_a_workgroup
from shaders.program import Program
from shaders.tensor import Tensor


def head_norm_backward(
    program: Program,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    epsilon: float,
    d_qkv: Tensor,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_size: int,
) -> None:
    """Appends the gradient through `head_norm`, in place; v's columns of d_qkv stay.

    Args:
        program: what the dispatch is appended to.
        qkv: [rows, (n_heads + 2 n_kv_heads) · head_size], what `head_norm` was given.
        q_weight: [head_size].
        k_weight: [head_size].
        epsilon: as in the forward.
        d_qkv: as qkv: the gradient to the output becomes the gradient to the input.
        n_heads: query heads.
        n_kv_heads: key heads, and as many value heads.
        head_size: columns of a head.
    """
    constants = head_norm_constants(
        program.device, qkv, q_weight, k_weight, epsilon, n_heads, n_kv_heads, head_size
    )
    check_shape("head_norm_backward d_qkv", d_qkv, *qkv.shape)
    extent = extent_of(d_qkv)
    program.dispatch(
        "head_norm_backward",
        constants,
        [extent.uniform, qkv, q_weight, k_weight, d_qkv],
        -(-extent.maximum * (n_heads + n_kv_heads) // heads_a_workgroup(constants)),
    )
