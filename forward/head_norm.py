"""RMSNorm of every query and key head, before rope (Dehghani et al. 2023; Gemma 3, Qwen 3)."""

from __future__ import annotations

from typing import Any

from forward.activations import activation, check_shape, extent_of
from shaders.device import Device
from shaders.program import Program
from shaders.tensor import Tensor

# Lanes of a workgroup, and quads of columns a lane until there are more lanes a head, at least 8.
GPU_LANES, GPU_QUADS = 64, 4
CPU_LANES, CPU_QUADS = 8, 8  # one vector: no lane waits for another


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
        program.device, qkv, q_weight, k_weight, epsilon, n_heads, n_kv_heads, head_size
    )
    extent = extent_of(qkv)
    y = out if out is not None else activation(program, extent, qkv.shape[1])
    check_shape("head_norm output", y, *qkv.shape)
    program.dispatch(
        "head_norm",
        constants,
        [extent.uniform, qkv, q_weight, k_weight, y],
        -(-extent.maximum * (n_heads + 2 * n_kv_heads) // heads_a_workgroup(constants)),
    )
    return y


def head_norm_constants(
    device: Device,
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
    if head_size % 4:
        raise ValueError(f"head_norm: a head size of {head_size} is no multiple of 4")
    lanes, quads = (CPU_LANES, CPU_QUADS) if device.is_cpu else (GPU_LANES, GPU_QUADS)
    sum_lanes = 8
    while sum_lanes < lanes and 4 * quads * sum_lanes < head_size:
        sum_lanes *= 2
    return {
        "lanes": lanes,
        "sum_lanes": sum_lanes,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_size": head_size,
        "epsilon": epsilon,
    }


def heads_a_workgroup(constants: dict[str, Any]) -> int:
    """Heads that one workgroup norms under the constants of `head_norm_constants`."""
    return int(constants["lanes"] // constants["sum_lanes"])
