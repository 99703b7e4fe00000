"""The gated feed-forward as a block of a layer, for one new token on a GPU."""

from __future__ import annotations

from lora.forward.decoder.gated_block import GatedActivations
from lora.forward.decoder.row_recorder import Row, RowEnd, RowRecorder
from lora.forward.int_row import to_int_row
from lora.forward.model.layer_spec import GatedFeedForward
from lora.forward.product import can_gate
from lora.forward.swiglu import swiglu


def record_gated_row(
    layer: RowRecorder, spec: GatedFeedForward, act: GatedActivations, row: Row, end: RowEnd
) -> None:
    """Appends the block, of a row in the form that gate and up's product takes."""
    gated = layer.before("gated", act.gated, "down")
    if can_gate(layer.weights.matrices["gate_up"]):
        layer.product(row, "gate_up", act.gated, gate=spec.activation, then=gated)
    else:
        layer.product(row, "gate_up", act.gate_up)
        swiglu(layer.program, act.gate_up, activation_name=spec.activation, out=act.gated)
        if gated.ints is not None:
            to_int_row(layer.program, act.gated, gated.ints)
    layer.end(gated, "down", end)
