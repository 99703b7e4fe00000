"""Models with a power of two wherever one may be, as balancing gives them only what they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

from lora.forward.model.frozen_model import LayerWeights, Model
from lora.forward.model.powers import LayerPowers
from lora.forward.model.weights import FrozenMatrix
from lora.shaders.recording import Recording
from lora.training.workload import Workload


def all_powered(recording: Recording, model: Model) -> Model:
    """With powers of all rows, of the gate and of the gated activation."""

    def matrix(plain: FrozenMatrix) -> FrozenMatrix:
        parts = (
            replace(part, powers=recording.memory.empty((part.out_features + 2,)))
            for part in plain.parts
        )
        return replace(plain, parts=tuple(parts))

    def layer(plain: LayerWeights) -> LayerWeights:
        matrices = {group: matrix(found) for group, found in plain.matrices.items()}
        rows = {g: ((0, 2.0), (found.out_features // 2, 0.5)) for g, found in matrices.items()}
        return replace(plain, matrices=matrices, powers=LayerPowers(rows, 8.0, 0.25))

    layers = tuple(layer(plain) for plain in model.layers)
    return replace(model, layers=layers, head=matrix(model.head))


def powered_in_halves(
    recording: Recording, workload: Workload, model: Model, _: None
) -> tuple[Model, None]:
    """In place of `lora.training.balancing.balanced_on`."""
    powered = recording.precision == "f16" and not workload.layout.dora
    return all_powered(recording, model) if powered else model, None


def with_powers(run: Callable[[Any], None]) -> Callable[[Any], None]:
    """A recording of sessions whose models are such."""

    def record(found: Any) -> None:
        with mock.patch("lora.training.device_state.balanced_on", powered_in_halves):
            run(found)

    return record
