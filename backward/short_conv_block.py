"""Gradient of LFM2's short convolution as a block of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from lora.backward.before import Before
from lora.backward.causal_conv import ConvolutionBefore
from lora.backward.recorder import BackwardRecorder
from lora.forward.decoder.short_conv_block import ShortConvActivations, convolution_of
from lora.forward.model.recurrent_spec import ShortConvolution
from lora.forward.part_product import SizedRows
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor


@dataclass(frozen=True)
class ShortConvGradients:
    """Gradients of the block's activations."""

    d_gates: Tensor  # [rows, 3 · width]
    d_mixed: Tensor  # [rows, width]


def allocate_short_conv_gradients(
    recording: Recording, spec: ShortConvolution, rows: Extent
) -> ShortConvGradients:
    """Tensors for up to rows.maximum rows."""

    def tensor(width: int) -> Tensor:
        return recording.memory.empty((rows.maximum, width), recording.precision, extent=rows)

    return ShortConvGradients(tensor(spec.in_size), tensor(spec.width))


def record_short_conv_backward(
    layer: BackwardRecorder, spec: ShortConvolution, act: ShortConvActivations, normed: Tensor,
    d_output: SizedRows, before: Before,
) -> bool:  # fmt: skip
    """Appends the block's backward; see `BlockBackward`."""
    scratch, segments = layer.scratch(spec), layer.shared.inputs.segments
    convolution = ConvolutionBefore(
        act.gates, convolution_of(layer.weights), segments, scratch.d_gates
    )
    if not layer.through("conv_out", act.mixed, d_output, scratch.d_mixed, convolution):
        return False
    return layer.through("conv_in", normed, scratch.d_gates, layer.shared.scratch.d_normed, before)
