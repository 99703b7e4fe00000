"""The dense gated feed-forward as a block of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from lora.forward.decoder.recorder import BlockEnd, LayerRecorder
from lora.forward.model.layer_spec import GatedFeedForward
from lora.forward.swiglu import GateAfter
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor


@dataclass(frozen=True)
class GatedActivations:
    """What the block computes."""

    gate_up: Tensor  # [rows, 2 · intermediate_size]
    gated: Tensor  # [rows, intermediate_size]


def allocate_gated(
    recording: Recording,
    spec: GatedFeedForward,
    rows: Extent,
    shared: GatedActivations | None = None,
) -> GatedActivations:
    """Tensors for up to rows.maximum rows; `gated` may be shared."""

    def tensor(width: int) -> Tensor:
        return recording.memory.empty((rows.maximum, width), recording.precision, extent=rows)

    gated = tensor(spec.intermediate_size) if shared is None else shared.gated
    return GatedActivations(tensor(spec.gate_up_size), gated)


def record_gated(
    layer: LayerRecorder, spec: GatedFeedForward, act: GatedActivations, normed: Tensor,
    end: BlockEnd,
) -> None:  # fmt: skip
    """Appends the block, of `normed` [rows, hidden_size]."""
    gate = GateAfter(spec.activation, act.gated, layer.weights.powers)
    layer.product(normed, "gate_up", act.gate_up, then=gate)
    layer.end(act.gated, "down", end)
