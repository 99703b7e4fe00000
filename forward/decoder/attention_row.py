"""Attention as a block of a layer, for one new token on a GPU: its heads are one kernel's."""

from __future__ import annotations

from lora.forward.attention_decode import MOST_FUSED_HEAD, RowRope, attention_decode_row
from lora.forward.decoder.attention_block import (
    AttentionActivations,
    gate_output,
    head_norms,
    norm_spans,
    ready_heads,
    warm_queries,
)
from lora.forward.decoder.recorder import Attending, keep_and_attend
from lora.forward.decoder.row_recorder import Row, RowEnd, RowRecorder
from lora.forward.heads import Heads
from lora.forward.int_row import to_int_row
from lora.forward.model.layer_spec import HEAD_NORM, LATE_NORM, Attention


def record_attention_row(
    layer: RowRecorder, spec: Attention, act: AttentionActivations, row: Row, end: RowEnd
) -> None:
    """Appends the block, of a row in the form that qkv's product takes."""
    program, weights, inputs = layer.program, layer.weights, layer.inputs
    plain = spec.qk_norm == HEAD_NORM and not spec.norms_spans
    plain = plain and spec.head_size <= MOST_FUSED_HEAD
    raw = act.qkv if plain or act.raw_qkv is None else act.raw_qkv
    layer.product(row, "qkv", raw)
    attended = layer.before("attended", act.gated or act.attended, "attn_output")
    apart = spec.qk_norm == LATE_NORM or spec.value_norm or spec.output_gate
    if apart or spec.head_size > MOST_FUSED_HEAD:
        ready_heads(program, weights, spec, act, inputs.rope_rows)
        keep_and_attend(
            program,
            inputs,
            layer.cache,
            Heads.of(spec),
            Attending(act.qkv, act.attended, act.lse, spec.keys_of),
        )
        out = gate_output(program, spec, act)
        if attended.ints is not None:
            to_int_row(program, out, attended.ints)
        layer.end(attended, "attn_output", end)
        return
    norm_spans(program, weights, spec, act)
    warm_queries(program, weights, spec, act.qkv, inputs.rope_rows)
    assert weights.rope is not None
    rope = RowRope(weights.rope, spec.rope.interleaved, head_norms(weights))
    attention_decode_row(
        program, act.qkv, inputs.place, layer.cache, Heads.of(spec), rope,
        out=act.attended, int_out=attended.ints,
    )  # fmt: skip
    layer.end(attended, "attn_output", end)
