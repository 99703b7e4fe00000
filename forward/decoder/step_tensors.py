"""What one run of new tokens through the decoder computes on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora.forward.decoder.layers import LayerActivations
from lora.forward.decoder.per_layer_block import per_layer_values
from lora.forward.decoder.row_recorder import RowMemory
from lora.forward.model.frozen_model import Model
from lora.forward.model.layer_spec import LayerSpec
from lora.forward.model.trained_tokens import TokenRows
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor


@dataclass(frozen=True)
class StepActivations:
    """What the layers compute on the way; layers of the same sizes in the same tensors.

    Attributes:
        x: [rows, hidden_size], the residual stream.
        layers: by `LayerSpec.sizes`.
        memory: of single rows and of what is adapted.
        per_layer: [rows, layers · size], what tokens have for the layers; None in models without.
    """

    x: Tensor
    layers: Mapping[tuple[object, ...], LayerActivations]
    memory: RowMemory
    per_layer: Tensor | None = None

    def of(self, spec: LayerSpec) -> LayerActivations:
        """Those of a layer."""
        return self.layers[spec.sizes]

    @classmethod
    def allocate(cls, recording: Recording, model: Model, rows: Extent) -> StepActivations:
        """Tensors for up to rows.maximum tokens."""
        a = model.architecture
        return cls(
            x=recording.memory.empty((rows.maximum, a.hidden_size), extent=rows),
            layers={
                spec.sizes: LayerActivations.allocate(recording, spec, rows, {})
                for spec in {spec.sizes: spec for spec in a.layers}.values()
            },
            memory=RowMemory(rows),
            per_layer=per_layer_values(recording, model, rows),
        )


@dataclass(frozen=True)
class StepHead:
    """The last row's way to its logits."""

    row: Extent  # of one row, always in use
    last: Tensor  # [1, hidden_size]
    normed: Tensor  # [1, hidden_size]
    logits: Tensor  # [1, logits_size]
    token: Tensor  # u32 [1], the most likely one

    @classmethod
    def allocate(cls, recording: Recording, model: Model) -> StepHead:
        """Tensors for one row."""
        a = model.architecture
        row = recording.memory.extent(1)
        return cls(
            row=row,
            last=recording.memory.empty((1, a.hidden_size), extent=row),
            normed=recording.memory.empty((1, a.hidden_size), extent=row),
            logits=recording.memory.empty((1, a.logits_size), purpose="logits", extent=row),
            token=recording.memory.empty((1,), "u32", extent=row),
        )

    def own(self, recording: Recording, tokens: TokenRows) -> Tensor:
        """A new tensor for the logits of trained tokens, [1, tokens in whole quads]."""
        shape = 1, tokens.rows.shape[0]
        return recording.memory.empty(shape, purpose="logits", extent=self.row)
