"""Gradient of attention as a block of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from lora.backward.attention import Attended, attention_backward
from lora.backward.head_norm_rope import head_norm_rope_backward
from lora.backward.recorder import BackwardRecorder, Before
from lora.backward.rope import rope_backward
from lora.backward.span_norm import span_norm_backward
from lora.forward.decoder.attention_block import (
    AttentionActivations,
    head_norms,
    rotation_of,
    spans_of,
    warm_queries,
)
from lora.forward.heads import Heads
from lora.forward.model.layer_spec import LATE_NORM, SPAN_NORMS, Attention
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor


@dataclass(frozen=True)
class AttentionGradients:
    """Gradients of the block's activations."""

    d_attended: Tensor  # [rows, query_size]
    d_qkv: Tensor  # [rows, qkv_size]
    dots: Tensor  # f32 [rows, n_heads], D of the attention's backward


def allocate_attention_gradients(
    recording: Recording, spec: Attention, rows: Extent
) -> AttentionGradients:
    """Tensors for up to rows.maximum rows."""

    def tensor(width: int, dtype: str = recording.precision) -> Tensor:
        return recording.memory.empty((rows.maximum, width), dtype, extent=rows)

    return AttentionGradients(
        tensor(spec.query_size), tensor(spec.qkv_size), tensor(spec.n_heads, "f32")
    )


def record_attention_backward(
    layer: BackwardRecorder, spec: Attention, act: AttentionActivations, normed: Tensor,
    d_output: Tensor, before: Before,
) -> bool:  # fmt: skip
    """Appends the block's backward; see `BlockBackward`."""
    program, inputs, weights = layer.program, layer.shared.inputs, layer.weights
    scratch, heads = layer.scratch(spec), Heads.of(spec)
    if not layer.through("attn_output", act.attended, d_output, scratch.d_attended):
        return False
    attended = Attended(act.qkv, act.attended, act.lse)
    attention_backward(
        program, attended, scratch.d_attended, inputs.segments, heads, d_qkv=scratch.d_qkv,
        dots=scratch.dots,
    )  # fmt: skip
    rotation, norms = rotation_of(weights, spec, inputs.positions), head_norms(weights)
    if act.raw_qkv is not None and norms is not None:
        head_norm_rope_backward(program, act.raw_qkv, norms, rotation, heads, scratch.d_qkv)
    else:
        late = spec.qk_norm == LATE_NORM
        turning = spec.n_heads + spec.n_kv_heads
        if not late:
            rope_backward(program, scratch.d_qkv, rotation, turning, spec.head_size)
        if spec.norms_spans and act.raw_qkv is not None:
            spans = [span for span in spans_of(spec) if span.normed]  # in place: v's stays
            span_norm_backward(
                program, act.raw_qkv, weights.vectors[SPAN_NORMS], weights.spec.norm_epsilon,
                spans, scratch.d_qkv, scratch.d_qkv,
            )  # fmt: skip
        if late:
            rope_backward(program, scratch.d_qkv, rotation, turning, spec.head_size)
    warm_queries(program, weights, spec, scratch.d_qkv, inputs.positions)
    return layer.through("qkv", normed, scratch.d_qkv, layer.shared.scratch.d_normed, before)
