"""LFM2's short convolution as a block of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from lora.forward.causal_conv import Convolution, causal_conv, causal_conv_text
from lora.forward.decoder.recorder import AfterCache, BlockEnd, LayerRecorder
from lora.forward.decoder.row_recorder import Row, RowEnd, RowRecorder
from lora.forward.int_row import to_int_row
from lora.forward.model.frozen_model import LayerWeights
from lora.forward.model.kv_cache import TextState
from lora.forward.model.recurrent_spec import CONV_WEIGHT, ShortConvolution
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor


@dataclass(frozen=True)
class ShortConvActivations:
    """What the block computes."""

    gates: Tensor  # [rows, 3 · width]: B, C and x
    mixed: Tensor  # [rows, width]


def allocate_short_conv(
    recording: Recording,
    spec: ShortConvolution,
    rows: Extent,
    shared: ShortConvActivations | None = None,
) -> ShortConvActivations:
    """Tensors for up to rows.maximum rows; `mixed` may be shared."""

    def tensor(width: int) -> Tensor:
        return recording.memory.empty((rows.maximum, width), recording.precision, extent=rows)

    mixed = tensor(spec.width) if shared is None else shared.mixed
    return ShortConvActivations(tensor(spec.in_size), mixed)


def allocate_short_conv_state(recording: Recording, spec: ShortConvolution, room: int) -> TextState:
    """What the rows of a text leave for those after them, however long it is."""
    shape = (spec.taps - 1, spec.width)
    return TextState((recording.memory.empty(shape, purpose="key-value cache"),))


def convolution_of(weights: LayerWeights) -> Convolution:
    """The convolution of a layer."""
    return Convolution(weights.vectors[CONV_WEIGHT], gated=True)


def record_short_conv(
    layer: LayerRecorder, spec: ShortConvolution, act: ShortConvActivations, normed: Tensor,
    end: BlockEnd,
) -> None:  # fmt: skip
    """Appends the block, of `normed` [rows, hidden_size]."""
    context, convolution = layer.walk.context, convolution_of(layer.weights)
    layer.product(normed, "conv_in", act.gates)
    if isinstance(context, AfterCache):
        (state,) = context.caches[layer.layer].tensors
        positions = context.inputs.positions
        causal_conv_text(layer.program, act.gates, convolution, positions, state, act.mixed)
    else:
        causal_conv(layer.program, act.gates, convolution, context.segments, act.mixed)
    layer.end(act.mixed, "conv_out", end)


def record_short_conv_row(
    layer: RowRecorder, spec: ShortConvolution, act: ShortConvActivations, row: Row, end: RowEnd
) -> None:
    """Appends the block for one new token on a GPU."""
    (state,) = layer.cache.tensors
    layer.product(row, "conv_in", act.gates)
    causal_conv_text(
        layer.program, act.gates, convolution_of(layer.weights), layer.inputs.positions, state,
        act.mixed,
    )  # fmt: skip
    mixed = layer.before("mixed", act.mixed, "conv_out")
    if mixed.ints is not None:
        to_int_row(layer.program, act.mixed, mixed.ints)
    layer.end(mixed, "conv_out", end)
