"""Attention as a block of a layer: q, k, v, their rope, attention, and the output's product."""

from __future__ import annotations

from dataclasses import dataclass

from lora.forward.decoder.recorder import Attending, BlockEnd, LayerRecorder
from lora.forward.head_norm_rope import head_norm_rope
from lora.forward.heads import Heads, Rotation
from lora.forward.model.frozen_model import LayerWeights
from lora.forward.model.layer_spec import K_NORM, Q_NORM, Attention
from lora.forward.model.norm import HeadNorms, Norm
from lora.forward.rope import rope
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor


@dataclass(frozen=True)
class AttentionActivations:
    """What the block computes."""

    raw_qkv: Tensor | None  # [rows, qkv_size], before the norm of its heads, with qk_norm
    qkv: Tensor  # [rows, qkv_size], q and k normed and rotated
    attended: Tensor  # [rows, query_size]
    lse: Tensor  # f32 [rows, n_heads]


def allocate_attention(recording: Recording, spec: Attention, rows: Extent) -> AttentionActivations:
    """Tensors for up to rows.maximum rows."""

    def tensor(width: int, dtype: str = recording.precision) -> Tensor:
        return recording.memory.empty((rows.maximum, width), dtype, extent=rows)

    return AttentionActivations(
        raw_qkv=tensor(spec.qkv_size) if spec.qk_norm else None,
        qkv=tensor(spec.qkv_size),
        attended=tensor(spec.query_size),
        lse=tensor(spec.n_heads, "f32"),
    )


def head_norms(weights: LayerWeights) -> HeadNorms | None:
    """The norms of a layer's heads, with qk_norm."""
    if Q_NORM not in weights.vectors:
        return None
    epsilon = weights.spec.norm_epsilon
    return HeadNorms(*(Norm(weights.vectors[name], epsilon) for name in (Q_NORM, K_NORM)))


def rotation_of(weights: LayerWeights, spec: Attention, positions: Tensor) -> Rotation:
    """How a layer's heads turn; positions u32 [rows], rows of its rope's tables."""
    assert weights.rope is not None  # attention has a rope, though one that turns nothing
    return Rotation(positions, weights.rope, spec.rope.interleaved)


def record_attention(
    layer: LayerRecorder, spec: Attention, act: AttentionActivations, normed: Tensor, end: BlockEnd
) -> None:
    """Appends the block, of `normed` [rows, hidden_size]."""
    program, context, weights = layer.program, layer.walk.context, layer.weights
    heads, norms = Heads.of(spec), head_norms(weights)
    rotation = rotation_of(weights, spec, context.positions)
    layer.product(normed, "qkv", act.raw_qkv or act.qkv)
    if act.raw_qkv is not None and norms is not None:
        head_norm_rope(program, act.raw_qkv, norms, rotation, heads, out=act.qkv)
    else:
        rope(program, act.qkv, rotation, spec.n_heads + spec.n_kv_heads, spec.head_size)
    context.attend(program, layer.layer, heads, Attending(act.qkv, act.attended, act.lse))
    layer.end(act.attended, "attn_output", end)
