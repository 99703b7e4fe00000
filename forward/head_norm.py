"""RMSNorm of every query and key head, before rope (Dehghani et al. 2023; Gemma 3, Qwen 3)."""

from __future__ import annotations

from typing import Any

from forward.activations import activation, check_shape, extent_of
from shaders.program import Program
from shaders.tensor import Tensor


def head_norm(
    program: Program,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    epsilon: float,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_size: int,
    out: Tensor | None = None,
) -> Tensor:  # [rows, (n_heads + 2 n_kv_heads) · head_size]
    """Appends qkv with each head of q and of k normed on its own; v is copied.

    Args:
        program: what the dispatch is appended to.
        qkv: [rows, (n_heads + 2 n_kv_heads) · head_size]: heads of q, of k, of v.
        q_weight: [head_size], for the heads of q.
        k_weight: [head_size], for the heads of k.
        epsilon: added to the mean square.
        n_heads: query heads.
        n_kv_heads: key heads, and as many value heads.
        head_size: columns of a head.
        out: where to write; a new tensor by default. Not `qkv`, which the backward reads.
    """
    constants = head_norm_constants(
        qkv, q_weight, k_weight, epsilon, n_heads, n_kv_heads, head_size
    )
    extent = extent_of(qkv)
    y = out if out is not None else activation(program, extent, qkv.shape[1])
    check_shape("head_norm output", y, *qkv.shape)
    program.dispatch(
        "head_norm",
        constants,
        [extent.uniform, qkv, q_weight, k_weight, y],
        extent.maximum * (n_heads + 2 * n_kv_heads),
    )
    return y


def head_norm_constants(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    epsilon: float,
    n_heads: int,
    n_kv_heads: int,
    head_size: int,
) -> dict[str, Any]:
    """The template constants that forward and backward share, once the shapes fit."""
    check_shape("head_norm qkv", qkv, None, (n_heads + 2 * n_kv_heads) * head_size)
    check_shape("head_norm q_weight", q_weight, head_size)
    check_shape("head_norm k_weight", k_weight, head_size)
    return {
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_size": head_size,
        "epsilon": epsilon,
    }
