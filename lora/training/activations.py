"""What lies between the layers of a step, and what the layers themselves compute on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lora.forward.decoder.head import HeadActivations
from lora.forward.decoder.layers import (
    LayerActivations,
    low_rank_tensors,
    product_tensors,
)
from lora.forward.decoder.per_layer_block import per_layer_values
from lora.forward.decoder.recorder import WithinExamples
from lora.forward.model.factors import Factors
from lora.forward.model.frozen_model import Model
from lora.forward.model.inputs import Inputs
from lora.forward.model.layer_spec import Attention
from lora.optim.guard import METRICS, STATE_AT
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor


def allocate_layer(
    recording: Recording,
    model: Model,
    inputs: Inputs,
    factors: Factors,
    layer: int,
    shared: LayerActivations | None = None,
) -> LayerActivations:
    """Activations of one layer, its low-rank ones included; `shared` as of `LayerActivations`."""
    z = low_rank_tensors(recording, factors, layer, inputs.rows)
    spec = model.layers[layer].spec
    found = LayerActivations.allocate(recording, spec, inputs.rows, z, shared)
    return replace(found, products=product_tensors(recording, model, factors, layer, inputs.rows))


Sizes = tuple[object, ...]  # of a LayerSpec


def allocate_layers(
    recording: Recording, model: Model, inputs: Inputs, factors: Factors
) -> dict[int, LayerActivations]:
    """Activations of the layer that is being computed: layers of the same sizes share them.

    The z of a group is shared by the layers whose ranks are the same, too.
    """
    by_sizes: dict[Sizes, LayerActivations] = {}
    by_width: dict[tuple[str, int], Tensor] = {}
    by_columns: dict[tuple[str, int], Tensor] = {}
    found = {}
    for layer, weights in enumerate(model.layers):
        if weights.spec.sizes not in by_sizes:
            by_sizes[weights.spec.sizes] = LayerActivations.allocate(
                recording, weights.spec, inputs.rows, {}
            )
        z, products = {}, {}
        for (of_layer, group), lora in factors.items():
            if of_layer == layer:
                width = lora.n_members * lora.rank
                if (group, width) not in by_width:
                    shape = (inputs.rows.maximum, width)
                    by_width[group, width] = recording.memory.empty(shape, extent=inputs.rows)
                z[group] = by_width[group, width]
                if lora.magnitude is not None:
                    n = weights.matrices[group].out_features
                    if (group, n) not in by_columns:
                        one = product_tensors(recording, model, factors, layer, inputs.rows)
                        by_columns |= {(name, t.shape[1]): t for name, t in one.items()}
                    products[group] = by_columns[group, n]
        found[layer] = replace(by_sizes[weights.spec.sizes], z=z, products=products)
    return found


@dataclass(frozen=True)
class Activations:
    """Tensors between the layers, shared by training and evaluation."""

    boundary: Tensor  # [rows, hidden_size], what enters the lowest adapted layer
    final: Tensor  # [rows, hidden_size], the output of the last layer
    shared: Mapping[int, LayerActivations]  # by layer, of the one that is being computed
    head: HeadActivations
    loss_sum: Tensor  # [64], the first of which is the sum of losses
    state: Tensor  # [64], of gradient_norm and step_guard; beside `loss_sum` in one buffer
    metrics: Tensor  # [128], both
    kept: Mapping[int, Tensor]  # [rows, 2 · kv_size], keys and values that other layers take
    per_layer: Tensor | None  # [rows, layers · size], what tokens have for the layers

    @classmethod
    def allocate(
        cls, recording: Recording, model: Model, inputs: Inputs, factors: Factors
    ) -> Activations:
        """Tensors for micro-batches of up to inputs.rows.maximum tokens."""
        shape = (inputs.rows.maximum, model.architecture.hidden_size)
        metrics = recording.memory.empty((METRICS,))
        return cls(
            boundary=recording.memory.empty(shape, extent=inputs.rows),
            final=recording.memory.empty(shape, extent=inputs.rows),
            shared=allocate_layers(recording, model, inputs, factors),
            head=HeadActivations.allocate(recording, model, inputs, factors),
            loss_sum=metrics.slice(0, STATE_AT),
            state=metrics.slice(STATE_AT, METRICS),
            metrics=metrics,
            kept=_kept_keys(recording, model, inputs),
            per_layer=per_layer_values(recording, model, inputs.rows),
        )

    def context(self, inputs: Inputs) -> WithinExamples:
        """What the layers walk through examples with."""
        return WithinExamples(inputs, self.kept, self.per_layer)


def _kept_keys(recording: Recording, model: Model, inputs: Inputs) -> dict[int, Tensor]:
    """Room for the keys and values that layers take from others, by the others."""
    mixers = {donor: model.layers[donor].spec.mixer for donor in model.architecture.donors}
    return {
        donor: recording.memory.empty(
            (inputs.rows.maximum, 2 * mixer.kv_size), recording.precision, extent=inputs.rows
        )
        for donor, mixer in mixers.items()
        if isinstance(mixer, Attention)
    }
