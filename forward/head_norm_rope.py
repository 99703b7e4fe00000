"""RMSNorm of every query and key head, then rope (Dehghani et al. 2023; Gemma 3, Qwen 3)."""

from __future__ import annotations

from typing import Any

from lora.forward.rope import rope
from lora.shaders.activations import activation, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

# Lanes of a workgroup, and quads of columns a lane until there are more lanes a head, at least 8.
GPU_LANES, GPU_QUADS = 64, 4
CPU_LANES, CPU_QUADS = 8, 8  # one vector: no lane waits for another


def head_norm_rope(
    program: Program,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    epsilon: float,
    positions: Tensor,
    tables: Tensor,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_size: int,
    interleaved: bool,
    out: Tensor | None = None,
) -> Tensor:  # [rows, (n_heads + 2 n_kv_heads) · head_size]
    """Appends qkv with each head of q and of k normed on its own, then rotated; v is copied.

    Args:
        program: what the dispatch is appended to.
        qkv: [rows, (n_heads + 2 n_kv_heads) · head_size], f32 or f16: heads of q, of k, of v.
        q_weight: [head_size], for the heads of q.
        k_weight: [head_size], for the heads of k.
        epsilon: added to the mean square.
        positions: u32 [rows], within each token's example.
        tables: [n_positions, rope_dimensions / 2, 2] from `Rope.tables`.
        n_heads: query heads.
        n_kv_heads: key heads, and as many value heads.
        head_size: columns of a head; only its first rope_dimensions turn.
        interleaved: pairs (2j, 2j + 1) instead of (j, j + rope_dimensions / 2).
        out: where to write, f32 or f16; a new f32 tensor by default. Not `qkv`, which the backward
            reads.
    """
    check_head_shapes(qkv, q_weight, k_weight, positions, tables, n_heads, n_kv_heads, head_size)
    extent = extent_of(qkv)
    y = out if out is not None else activation(program, extent, qkv.shape[1])
    check_shape("head_norm_rope output", y, *qkv.shape)
    together = turns_whole_quads(tables, interleaved)
    constants = head_constants(
        program.recording, tables.shape[1] if together else 0, epsilon, n_heads, n_kv_heads,
        head_size, interleaved,
    )  # fmt: skip
    program.dispatch(
        "head_norm_rope",
        constants | {"x_type": qkv.dtype, "out_type": y.dtype},
        [extent.uniform, qkv, q_weight, k_weight, y, *([positions, tables] if together else [])],
        -(-extent.maximum * (n_heads + 2 * n_kv_heads) // heads_a_workgroup(constants)),
    )
    if not together:
        rope(
            program, y, positions, tables, n_rotated_heads=n_heads + n_kv_heads,
            head_size=head_size, interleaved=interleaved,
        )  # fmt: skip
    return y


def check_head_shapes(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    positions: Tensor,
    tables: Tensor,
    n_heads: int,
    n_kv_heads: int,
    head_size: int,
) -> None:
    """Refuses what does not fit together, forward and backward alike."""
    check_shape("head_norm_rope qkv", qkv, None, (n_heads + 2 * n_kv_heads) * head_size)
    check_shape("head_norm_rope q_weight", q_weight, head_size)
    check_shape("head_norm_rope k_weight", k_weight, head_size)
    check_shape("head_norm_rope positions", positions, qkv.shape[0])
    check_shape("head_norm_rope tables", tables, None, None, 2)
    if head_size % 4:
        raise ValueError(f"head_norm_rope: a head size of {head_size} is no multiple of 4")
    if 2 * tables.shape[1] > head_size:
        raise ValueError(
            f"head_norm_rope: {2 * tables.shape[1]} rotated columns do not fit heads of {head_size}"
        )


def turns_whole_quads(tables: Tensor, interleaved: bool) -> bool:
    """Whether the rotated columns, each half of them if not interleaved, are whole vec4s.

    Where they are not, rope follows the norm as a kernel of its own, which takes single columns.
    """
    return tables.shape[1] % (2 if interleaved else 4) == 0


def head_constants(
    recording: Recording,
    half: int,
    epsilon: float,
    n_heads: int,
    n_kv_heads: int,
    head_size: int,
    interleaved: bool,
) -> dict[str, Any]:
    """The template constants that forward and backward share; `half` 0 leaves the rotation out."""
    lanes, quads = (CPU_LANES, CPU_QUADS) if recording.facts.is_cpu else (GPU_LANES, GPU_QUADS)
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
        "half": half,
        "interleaved": interleaved,
    }


def heads_a_workgroup(constants: dict[str, Any]) -> int:
    """Heads that one workgroup takes under the constants of `head_constants`."""
    return int(constants["lanes"] // constants["sum_lanes"])
