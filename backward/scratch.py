"""Memory of the backward pass."""

from __future__ import annotations

from lora.backward.blocks import BLOCKS_BACKWARD
from lora.backward.lora import scales_columns
from lora.backward.lora_pending import gradients_wait
from lora.backward.recorder import N_OTHERS, Scratch, StreamGradient
from lora.forward.matmul_matrix import takes_copies
from lora.forward.matmul_paired import scales_rows
from lora.forward.model.factors import Factors
from lora.forward.model.frozen_model import Model
from lora.forward.model.inputs import Inputs
from lora.forward.model.layer_spec import Attention
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor


def allocate_scratch(
    recording: Recording, model: Model, inputs: Inputs, factors: Factors
) -> Scratch:
    """Tensors for the backward pass."""
    a, rows = model.architecture, inputs.rows

    def tensor(width: int, dtype: str = recording.precision) -> Tensor:
        return recording.memory.empty((rows.maximum, width), dtype, extent=rows)

    def over_targets(width: int) -> Tensor:
        return recording.memory.empty((inputs.targets.maximum, width), extent=inputs.targets)

    head = factors.get((a.n_layers, "head"))
    in_layers = [lora for (layer, _), lora in factors.items() if layer < a.n_layers]
    widths = {
        model.layers[layer].matrices[group].out_features
        for (layer, group), lora in factors.items()
        if lora.magnitude is not None and not scales_columns(recording, rows.maximum, lora)
    }
    blocks = {b.sizes: b for spec in a.layers for b in spec.blocks}
    lowest = min((layer for layer, _ in factors), default=a.n_layers)
    if factors.below_layers:
        lowest = 0
    # Below the lowest adapted layer nobody asks for the gradients of keys and values.
    kept = {donor: a.layers[donor].mixer for donor in a.donors if donor >= lowest}
    sizes = halves = None  # behind post norms no product reads the stream's gradient
    if scales_rows(recording, "f32", N_OTHERS) and not all(s.post_norms for s in a.layers):
        sizes = recording.memory.empty((rows.maximum,), "u32")
        if takes_copies(recording):
            halves = tensor(a.hidden_size, "f16")
    return Scratch(
        stream=StreamGradient(tensor(a.hidden_size, "f32"), sizes, halves),
        d_normed=tensor(a.hidden_size),
        d_output=tensor(a.hidden_size) if any(spec.norms_outputs for spec in a.layers) else None,
        blocks={
            sizes: BLOCKS_BACKWARD[type(block)].allocate(recording, block, rows)
            for sizes, block in blocks.items()
        },
        d_kept={
            donor: tensor(2 * mixer.kv_size, "f32")
            for donor, mixer in kept.items()
            if isinstance(mixer, Attention)
        },
        d_z={
            width: tuple(tensor(width, "f32") for _ in range(1 + gradients_wait(recording)))
            for width in sorted({f.n_members * f.rank for f in in_layers})
        },
        d_head_z=None if head is None else over_targets(head.rank),
        d_head_normed=over_targets(a.hidden_size),
        d_products={
            (width, dtype): tensor(width, dtype)
            for width in sorted(widths)
            for dtype in sorted({"f32", recording.precision})
        },
    )
