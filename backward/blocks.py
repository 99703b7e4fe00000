"""The table of blocks, backward: one row for each of forward/decoder/blocks.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora.backward.attention_block import allocate_attention_gradients, record_attention_backward
from lora.backward.delta_block import allocate_delta_gradients, record_delta_backward
from lora.backward.gated_block import allocate_gated_gradient, record_gated_backward
from lora.backward.per_layer_block import (
    allocate_per_layer_gradient,
    record_per_layer_backward,
)
from lora.backward.short_conv_block import (
    allocate_short_conv_gradients,
    record_short_conv_backward,
)
from lora.forward.model.layer_spec import Attention, GatedFeedForward, PerLayerInput
from lora.forward.model.recurrent_spec import GatedDeltaNet, ShortConvolution


@dataclass(frozen=True)
class BlockBackward:
    """The backward of one kind of mixer or feed-forward block.

    Attributes:
        allocate: (recording, spec, rows) → its gradients of activations.
        record: (BackwardRecorder, spec, activations, normed, d_output, Before) → whether
            anything below the block is wanted: appends the block from the gradient to what its
            last product gives (`SizedRows`) down to what lies before it. `normed`, and what the
            block shares with other layers, are for `BackwardRecorder.through` alone, which has
            them written again.
    """

    allocate: Callable[..., Any]
    record: Callable[..., bool]


BLOCKS_BACKWARD: Mapping[type, BlockBackward] = {
    Attention: BlockBackward(allocate_attention_gradients, record_attention_backward),
    ShortConvolution: BlockBackward(allocate_short_conv_gradients, record_short_conv_backward),
    GatedDeltaNet: BlockBackward(allocate_delta_gradients, record_delta_backward),
    GatedFeedForward: BlockBackward(allocate_gated_gradient, record_gated_backward),
    PerLayerInput: BlockBackward(allocate_per_layer_gradient, record_per_layer_backward),
}
