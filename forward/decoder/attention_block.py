"""Attention as a block of a layer: q, k, v, their rope, attention, and the output's product."""

from __future__ import annotations

from dataclasses import dataclass

from lora.forward.decoder.recorder import After, Attending, BlockEnd, LayerRecorder
from lora.forward.head_gate import head_gate
from lora.forward.head_norm_rope import HeadNormRopeAfter, head_norm_rope
from lora.forward.heads import Heads, Rotation
from lora.forward.model.frozen_model import LayerWeights
from lora.forward.model.layer_spec import (
    K_NORM,
    LATE_NORM,
    NO_NORM,
    Q_NORM,
    SPAN_NORMS,
    WIDTH_NORM,
    Attention,
)
from lora.forward.model.norm import HeadNorms, Norm
from lora.forward.rope import RopeAfter, rope
from lora.forward.scale_rows import scale_rows
from lora.forward.span_norm import Span, span_norm
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor


@dataclass(frozen=True)
class AttentionActivations:
    """What the block computes."""

    raw_qkv: Tensor | None  # [rows, projected_size], before the norm of q and k, with qk_norm
    qkv: Tensor  # [rows, qkv_size], q and k normed and rotated
    attended: Tensor  # [rows, query_size]
    lse: Tensor  # f32 [rows, n_heads]
    gated: Tensor | None = None  # [rows, query_size], with an output gate


def allocate_attention(
    recording: Recording,
    spec: Attention,
    rows: Extent,
    shared: AttentionActivations | None = None,
) -> AttentionActivations:
    """Tensors for up to rows.maximum rows; `gated` may be shared."""

    def tensor(width: int, dtype: str = recording.precision) -> Tensor:
        return recording.memory.empty((rows.maximum, width), dtype, extent=rows)

    gated = None if shared is None else shared.gated
    if shared is None and spec.output_gate:
        gated = tensor(spec.query_size)
    return AttentionActivations(
        raw_qkv=tensor(spec.projected_size) if spec.qk_norm != NO_NORM else None,
        qkv=tensor(spec.qkv_size),
        attended=tensor(spec.query_size),
        lse=tensor(spec.n_heads, "f32"),
        gated=gated,
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


def spans_of(spec: Attention) -> tuple[Span, ...]:
    """The norms of q, k and v as stretches of a row, where `norms_spans`.

    Without `value_norm` the columns of v are taken as they are, and come last.
    """
    q, kv = spec.query_size, spec.kv_size
    if spec.value_norm:
        size, n = spec.head_size, spec.n_kv_heads
        queries = Span(spec.n_heads, size, 0, 0, 0)
        if spec.keys_of is not None:
            return (queries,)
        from_column = q if spec.keys_are_values else q + kv
        return queries, Span(n, size, q, q, size), Span(n, size, from_column, q + kv, None)
    value = Span(1, kv, spec.query_rows + kv, q + kv, None, normed=False)
    if spec.qk_norm == WIDTH_NORM:
        return Span(1, q, 0, 0, 0), Span(1, kv, q, q, q), value
    size = spec.head_size
    queries = Span(spec.n_heads, size, 0, 0, 0, stride=spec.query_rows // spec.n_heads)
    return queries, Span(spec.n_kv_heads, size, spec.query_rows, q, size), value


def turned_heads(spec: Attention) -> int:
    """Heads of q and of k that rope turns; keys of another layer are turned already."""
    return spec.n_heads + (spec.n_kv_heads if spec.keys_of is None else 0)


def ready_heads(
    program: Program, weights: LayerWeights, spec: Attention, act: AttentionActivations,
    positions: Tensor,
) -> None:  # fmt: skip
    """Appends what makes q, k and v of their product ready for attention: norms, rope."""
    heads, norms = Heads.of(spec), head_norms(weights)
    rotation = rotation_of(weights, spec, positions)
    n_turned = turned_heads(spec)
    if act.raw_qkv is not None and norms is not None:
        head_norm_rope(program, act.raw_qkv, norms, rotation, heads, out=act.qkv)
        return
    late = spec.qk_norm == LATE_NORM
    if late and act.raw_qkv is not None:
        rope(program, act.raw_qkv, rotation, n_turned, spec.head_size)
    norm_spans(program, weights, spec, act)
    if not late:
        rope(program, act.qkv, rotation, n_turned, spec.head_size)


def ready_after(
    weights: LayerWeights, spec: Attention, act: AttentionActivations, positions: Tensor
) -> After | None:
    """What makes q, k and v ready with the end of their product; None where that takes more."""
    rotation, norms = rotation_of(weights, spec, positions), head_norms(weights)
    if weights.temperature is not None:
        return None
    if act.raw_qkv is None:
        return RopeAfter(rotation, turned_heads(spec), spec.head_size)
    return None if norms is None else HeadNormRopeAfter(norms, rotation, Heads.of(spec), act.qkv)


def norm_spans(
    program: Program, weights: LayerWeights, spec: Attention, act: AttentionActivations
) -> None:
    """Appends the norms of q and k that `span_norm` does, where there are such."""
    if not spec.norms_spans or act.raw_qkv is None:
        return
    epsilon = weights.spec.norm_epsilon
    span_norm(program, act.raw_qkv, weights.vectors[SPAN_NORMS], epsilon, spans_of(spec), act.qkv)


def warm_queries(
    program: Program, weights: LayerWeights, spec: Attention, qkv: Tensor, positions: Tensor
) -> None:
    """Appends the temperature of queries, before rope or after it, of q or of its gradient."""
    if weights.temperature is not None:
        scale_rows(
            program, qkv, weights.temperature, positions, n_columns=spec.query_size,
            label="temperature",
        )  # fmt: skip


def gate_output(program: Program, spec: Attention, act: AttentionActivations) -> Tensor:
    """Appends the output gate, where there is one; what the output's product takes."""
    if act.gated is None or act.raw_qkv is None:
        return act.attended
    head_gate(program, act.raw_qkv, act.attended, spec.head_size, out=act.gated)
    return act.gated


def record_attention(
    layer: LayerRecorder, spec: Attention, act: AttentionActivations, normed: Tensor, end: BlockEnd
) -> None:
    """Appends the block, of `normed` [rows, hidden_size]."""
    program, context, weights = layer.program, layer.walk.context, layer.weights
    heads = Heads.of(spec)
    ready = ready_after(weights, spec, act, context.positions)
    layer.product(normed, "qkv", act.raw_qkv or act.qkv, then=ready)
    if ready is None:
        warm_queries(program, weights, spec, act.raw_qkv or act.qkv, context.positions)
        ready_heads(program, weights, spec, act, context.positions)
    attending = Attending(act.qkv, act.attended, act.lse, spec.keys_of)
    context.attend(program, layer.layer, heads, attending)
    layer.end(gate_output(program, spec, act), "attn_output", end)
