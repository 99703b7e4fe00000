"""A layer's own input of every token, as a block after the feed-forward one (Gemma 3n and 4)."""

from __future__ import annotations

from dataclasses import dataclass

from lora.forward.decoder.recorder import BlockEnd, LayerRecorder
from lora.forward.decoder.row_recorder import Row, RowEnd, RowRecorder
from lora.forward.embedding import embedding
from lora.forward.int_row import to_int_row
from lora.forward.matmul import matmul
from lora.forward.matmul_row import matmul_row
from lora.forward.model.frozen_model import Model
from lora.forward.model.host_table import TableRows
from lora.forward.model.layer_spec import PerLayerInput
from lora.forward.per_layer import per_layer_gate, per_layer_inputs
from lora.forward.product import Product
from lora.shaders.activations import extent_of
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor


@dataclass(frozen=True)
class PerLayerActivations:
    """What the block computes."""

    gate: Tensor  # [rows, size], before its activation
    gated: Tensor  # [rows, size]


def allocate_per_layer(
    recording: Recording,
    spec: PerLayerInput,
    rows: Extent,
    shared: PerLayerActivations | None = None,
) -> PerLayerActivations:
    """Tensors for up to rows.maximum rows; `gated` may be shared."""

    def tensor() -> Tensor:
        shape = (rows.maximum, spec.size)
        return recording.memory.empty(shape, recording.precision, extent=rows)

    return PerLayerActivations(tensor(), tensor() if shared is None else shared.gated)


def per_layer_values(recording: Recording, model: Model, rows: Extent) -> Tensor | None:
    """What tokens have for the layers, [rows, layers · size]; None in models without."""
    if model.per_layer is None:
        return None
    shape = (rows.maximum, model.per_layer.table.width)
    return recording.memory.empty(shape, recording.precision, extent=rows)


def record_per_layer_inputs(
    program: Program, model: Model, x: Tensor, rows: TableRows | None, values: Tensor | None
) -> None:
    """Appends what tokens have for the layers, where a model has such.

    Args:
        x: [rows, hidden_size], the embeddings.
        rows: the tokens' rows of the table.
        values: of `per_layer_values`.
    """
    if model.per_layer is None or rows is None or values is None:
        return
    extent, product = extent_of(x), Product(x, model.per_layer.projection)
    with program.scope("per_layer_inputs"):
        if extent.maximum == 1:
            matmul_row(program, product, out=values, label="projection")
        else:
            matmul(program, product, out=values, label="projection")
        # Decoded for the next dispatch only.
        table = program.recording.memory.scratch(values.shape)
        embedding(program, rows.slots, rows.matrix, extent, out=table)
        per_layer_inputs(program, values, model.per_layer.norm, table, model.per_layer.scale)


def record_per_layer(
    layer: LayerRecorder, spec: PerLayerInput, act: PerLayerActivations, source: Tensor,
    end: BlockEnd,
) -> None:  # fmt: skip
    """Appends the block, of `source` [rows, hidden_size], the residual stream."""
    inputs = layer.walk.context.per_layer
    assert inputs is not None  # as the model has such
    layer.product(source, "inp_gate", act.gate)
    first = spec.layer * spec.size
    per_layer_gate(layer.program, act.gate, inputs, first, spec.activation, act.gated)
    layer.end(act.gated, "proj", end)


def record_per_layer_row(
    layer: RowRecorder, spec: PerLayerInput, act: PerLayerActivations, row: Row, end: RowEnd
) -> None:
    """Appends the block for one new token on a GPU."""
    assert layer.per_layer is not None
    layer.product(row, "inp_gate", act.gate)
    first = spec.layer * spec.size
    per_layer_gate(layer.program, act.gate, layer.per_layer, first, spec.activation, act.gated)
    gated = layer.before("per_layer", act.gated, "proj")
    if gated.ints is not None:
        to_int_row(layer.program, act.gated, gated.ints)
    layer.end(gated, "proj", end)
