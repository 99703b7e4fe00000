"""RMSNorm of every query and key head, then rope (Dehghani et al. 2023; Gemma 3, Qwen 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora.forward.heads import Heads, Rotation
from lora.forward.model.norm import HeadNorms
from lora.forward.plans.stretches import Stretches, stretch_constants
from lora.forward.rmsnorm import MOST_PARTIAL_QUADS
from lora.forward.rope import rope
from lora.shaders.activations import activation, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

# Lanes of a workgroup, and quads of columns a lane until there are more lanes a head, at least 8.
GPU_LANES, GPU_QUADS = 64, 4
CPU_LANES, CPU_QUADS = 8, 8  # one vector: no lane waits for another


@dataclass(frozen=True)
class HeadNormRopeAfter:
    """The norms and the rotation of a product; attributes as the arguments of `head_norm_rope`."""

    norms: HeadNorms
    rotation: Rotation
    heads: Heads
    out: Tensor
    scales_columns = False

    def record(self, program: Program, product: Tensor, stretches: Stretches | None = None) -> None:
        """See `Follower`; the product is written in either case."""
        head_norm_rope(
            program, product, self.norms, self.rotation, self.heads, out=self.out,
            stretches=stretches,
        )  # fmt: skip

    def adds_up(self, recording: Recording, width: int, splits: int) -> bool:
        """See `Follower`: a lane holds all stretches of its columns of a head."""
        c = head_constants(recording, self.norms, self.rotation, self.heads)
        turned = [c["half"] // 2] if c["interleaved"] else [c["half"] // 4] * 2
        parts = [*turned, c["head_size"] // 4 - c["half"] // 2]
        return splits * sum(-(-part // c["sum_lanes"]) for part in parts) <= MOST_PARTIAL_QUADS


def head_norm_rope(
    program: Program,
    qkv: Tensor,
    norms: HeadNorms,
    rotation: Rotation,
    heads: Heads,
    *,
    out: Tensor | None = None,
    stretches: Stretches | None = None,
) -> Tensor:  # [rows, (n_heads + 2 n_kv_heads) · head_size]
    """Appends qkv with each head of q and of k normed on its own, then rotated; v is copied.

    Args:
        program: what the dispatch is appended to.
        qkv: [rows, (n_heads + 2 n_kv_heads) · head_size], f32 or f16: heads of q, of k, of v.
        norms: of the heads.
        rotation: of the heads, each row by its position in its example.
        heads: how they lie.
        out: where to write, f32 or f16; a new f32 tensor by default. Not `qkv`, which the backward
            reads.
        stretches: where given, qkv is first written as their sum.
    """
    check_head_shapes(qkv, norms, rotation, heads)
    extent = extent_of(qkv)
    y = out if out is not None else activation(program, extent, qkv.shape[1])
    check_shape("head_norm_rope output", y, *qkv.shape)
    together = turns_whole_quads(rotation)
    constants = head_constants(program.recording, norms, rotation, heads)
    tensors = [extent.uniform, qkv, norms.q.weight, norms.k.weight, y]
    if together:
        tensors += [rotation.positions, rotation.tables]
    if stretches is not None:
        tensors[1] = stretches.partial
        tensors.append(qkv)
    program.dispatch(
        "head_norm_rope",
        constants
        | {"x_type": qkv.dtype, "out_type": y.dtype}
        | stretch_constants("head_norm_rope", stretches, extent.maximum, qkv.shape[1]),
        tensors,
        -(-extent.maximum * (heads.n_heads + 2 * heads.n_kv_heads) // heads_a_workgroup(constants)),
        label="head_norm_rope" if stretches is None else "reduce_head_norm_rope",
    )
    if not together:
        rope(program, y, rotation, heads.n_heads + heads.n_kv_heads, heads.head_size)
    return y


def check_head_shapes(qkv: Tensor, norms: HeadNorms, rotation: Rotation, heads: Heads) -> None:
    """Refuses what does not fit together, forward and backward alike."""
    half = rotation.tables.shape[1]
    check_shape("head_norm_rope qkv", qkv, None, heads.qkv_size)
    check_shape("head_norm_rope q_weight", norms.q.weight, heads.head_size)
    check_shape("head_norm_rope k_weight", norms.k.weight, heads.head_size)
    check_shape("head_norm_rope positions", rotation.positions, qkv.shape[0])
    check_shape("head_norm_rope tables", rotation.tables, None, None, 2)
    if 2 * half > heads.head_size:
        raise ValueError(
            f"head_norm_rope: {2 * half} rotated columns do not fit heads of {heads.head_size}"
        )


def turns_whole_quads(rotation: Rotation) -> bool:
    """Whether the rotated columns, each half of them if not interleaved, are whole vec4s.

    Where they are not, rope follows the norm as a kernel of its own, which takes single columns.
    """
    return rotation.tables.shape[1] % (2 if rotation.interleaved else 4) == 0


def head_constants(
    recording: Recording, norms: HeadNorms, rotation: Rotation, heads: Heads
) -> dict[str, Any]:
    """The template constants that forward and backward share; `half` 0 leaves the rotation out."""
    lanes, quads = (CPU_LANES, CPU_QUADS) if recording.facts.is_cpu else (GPU_LANES, GPU_QUADS)
    sum_lanes = 8
    while sum_lanes < lanes and 4 * quads * sum_lanes < heads.head_size:
        sum_lanes *= 2
    return {
        "lanes": lanes,
        "sum_lanes": sum_lanes,
        "n_heads": heads.n_heads,
        "n_kv_heads": heads.n_kv_heads,
        "head_size": heads.head_size,
        "epsilon": norms.q.epsilon,
        "half": rotation.tables.shape[1] if turns_whole_quads(rotation) else 0,
        "interleaved": rotation.interleaved,
    }


def heads_a_workgroup(constants: dict[str, Any]) -> int:
    """Heads that one workgroup takes under the constants of `head_constants`."""
    return int(constants["lanes"] // constants["sum_lanes"])
