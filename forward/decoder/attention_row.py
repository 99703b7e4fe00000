"""Attention as a block of a layer, for one new token on a GPU: its heads are one kernel's."""

from __future__ import annotations

from lora.forward.attention_decode import RowRope, attention_decode_row
from lora.forward.decoder.attention_block import AttentionActivations, head_norms
from lora.forward.decoder.row_recorder import Row, RowEnd, RowRecorder
from lora.forward.heads import Heads
from lora.forward.model.layer_spec import Attention


def record_attention_row(
    layer: RowRecorder, spec: Attention, act: AttentionActivations, row: Row, end: RowEnd
) -> None:
    """Appends the block, of a row in the form that qkv's product takes."""
    layer.product(row, "qkv", act.qkv)
    attended = layer.before("attended", act.attended, "attn_output")
    assert layer.weights.rope is not None
    rope = RowRope(layer.weights.rope, spec.rope.interleaved, head_norms(layer.weights))
    attention_decode_row(
        layer.program, act.qkv, layer.inputs.place, layer.cache, Heads.of(spec), rope,
        out=act.attended, int_out=attended.ints,
    )  # fmt: skip
    layer.end(attended, "attn_output", end)
