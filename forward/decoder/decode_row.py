"""One new token through the layers on a GPU, in as few dispatches as there can be: six a layer.

A dispatch costs a GPU about as long as one of these products. So norms go into the product that
follows them and the gate's activation into the one before it; heads are normed, turned and stored
where attention reads them; and what a quantized product takes (`IntRow`) is written by the dispatch
before it. An adapted group has one more dispatch (its z), a model with post_norms two a layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from lora.forward.decoder.blocks import BLOCKS
from lora.forward.decoder.row_recorder import Row, RowEnd, RowRecorder
from lora.forward.decoder.step_tensors import StepActivations
from lora.forward.int_row import to_int_row
from lora.forward.model.frozen_model import Model
from lora.forward.model.norm import Norm
from lora.forward.scale_rows import scale_rows
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor


def fuses(recording: Recording) -> bool:
    """Whether one row takes this way; a CPU device would pay for norms in every lane."""
    return not recording.facts.is_cpu


def row_into(program: Program, model: Model, act: StepActivations, layer: int, x: Tensor) -> Row:
    """The residual stream as the first product of a layer (of the head: n_layers) takes it."""
    matrix, norm = model.head, cast("Norm | None", model.output_norm)
    if layer < len(model.layers):
        weights = model.layers[layer]
        matrix = weights.matrices[weights.spec.mixer.matrices[0].group]
        norm = weights.mixer_norm
    return act.memory.before(program.recording, "x", x, matrix, norm)


def record_first_row(program: Program, model: Model, act: StepActivations) -> None:
    """Appends what the first layer takes of the embedded token, act.x."""
    row = row_into(program, model, act, 0, act.x)
    if row.ints is not None:
        to_int_row(program, act.x, row.ints)


def record_row_layer(recorder: RowRecorder, act: StepActivations) -> None:
    """Appends one decoder layer for one row, in place: act.x += mixer, act.x += feed-forward.

    It finds act.x in the form that its first product takes, and leaves it as the next layer's (or
    the head's) takes it.
    """
    program, model, weights = recorder.program, recorder.model, recorder.weights
    spec = weights.spec
    tensors = act.of(spec)
    # The whole numbers of middle may lie where those of x lay: the mixer has read them.
    middle = act.memory.before(
        program.recording,
        "x",
        tensors.middle,
        weights.matrices[spec.feed_forward.matrices[0].group],
        weights.feed_forward_norm,
    )
    x = row_into(program, model, act, recorder.layer, act.x)
    end = RowEnd(act.x, weights.post_mixer_norm, tensors.mixer_output, then=middle)
    BLOCKS[type(spec.mixer)].record_row(recorder, spec.mixer, tensors.mixer, x, end)
    after = row_into(program, model, act, recorder.layer + 1, act.x)
    own, then = tensors.after_feed_forward, after
    if weights.output_scale is not None:  # whole numbers are made of what was scaled
        then = replace(after, ints=None)
    last = then
    if spec.per_layer is not None and own is not None:
        group = spec.per_layer.matrices[0].group
        last = act.memory.before(program.recording, "x", own, weights.matrices[group])
    end = RowEnd(
        tensors.middle, weights.post_feed_forward_norm, tensors.feed_forward_output, then=last
    )
    record = BLOCKS[type(spec.feed_forward)].record_row
    record(recorder, spec.feed_forward, tensors.feed_forward, middle, end)
    if spec.per_layer is not None and own is not None:
        end = RowEnd(own, weights.post_per_layer_norm, tensors.per_layer_output, then=then)
        record = BLOCKS[type(spec.per_layer)].record_row
        record(recorder, spec.per_layer, tensors.per_layer, last, end)
    if weights.output_scale is not None:
        scale_rows(program, act.x, weights.output_scale, label="output_scale")
        if after.ints is not None:
            to_int_row(program, act.x, after.ints)
