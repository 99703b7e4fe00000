"""The table of blocks: what the decoder does for each kind that a LayerSpec may name.

A kind more is one file beside attention_block.py and one row here; its gradient is another file
beside backward/attention_block.py and a row of the table there. CONTRIBUTING.md goes through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora.forward.decoder.attention_block import allocate_attention, record_attention
from lora.forward.decoder.attention_row import record_attention_row
from lora.forward.decoder.delta_block import (
    allocate_delta,
    allocate_delta_state,
    record_delta,
    record_delta_row,
)
from lora.forward.decoder.gated_block import allocate_gated, record_gated
from lora.forward.decoder.gated_row import record_gated_row
from lora.forward.decoder.per_layer_block import (
    allocate_per_layer,
    record_per_layer,
    record_per_layer_row,
)
from lora.forward.decoder.short_conv_block import (
    allocate_short_conv,
    allocate_short_conv_state,
    record_short_conv,
    record_short_conv_row,
)
from lora.forward.model.kv_cache import LayerCache
from lora.forward.model.layer_spec import Attention, GatedFeedForward, PerLayerInput
from lora.forward.model.recurrent_spec import GatedDeltaNet, ShortConvolution


@dataclass(frozen=True)
class Block:
    """One kind of mixer or feed-forward block. `spec` is what the layer's LayerSpec has of it.

    Attributes:
        allocate: (recording, spec, rows, shared) → its activations. `shared` are those of other
            layers' blocks of the same sizes, or None: what a `SourceBefore` of the backward writes
            again is taken from them.
        record: (LayerRecorder, spec, activations, normed, BlockEnd): appends it for rows of
            training, evaluation, recompute and a prompt's pieces.
        record_row: (RowRecorder, spec, activations, Row, RowEnd): appends it for one new token on
            a GPU.
        cache: (recording, spec, room) → what a text of up to `room` tokens leaves for the tokens
            after it; None for nothing.
    """

    allocate: Callable[..., Any]
    record: Callable[..., None]
    record_row: Callable[..., None]
    cache: Callable[..., Any] | None = None


BLOCKS: Mapping[type, Block] = {
    Attention: Block(
        allocate_attention, record_attention, record_attention_row, LayerCache.allocate
    ),
    ShortConvolution: Block(
        allocate_short_conv, record_short_conv, record_short_conv_row, allocate_short_conv_state
    ),
    GatedDeltaNet: Block(allocate_delta, record_delta, record_delta_row, allocate_delta_state),
    GatedFeedForward: Block(allocate_gated, record_gated, record_gated_row),
    PerLayerInput: Block(allocate_per_layer, record_per_layer, record_per_layer_row),
}
