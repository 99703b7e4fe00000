"""New tokens of a text through the decoder, attending to the cache: many at once or one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lora.forward.argmax import argmax
from lora.forward.decoder.blocks import BLOCKS
from lora.forward.decoder.decode_row import fuses, record_first_row, record_row_layer, row_into
from lora.forward.decoder.layers import record_embedding, record_layers
from lora.forward.decoder.per_layer_block import record_per_layer_inputs
from lora.forward.decoder.recorder import AfterCache, Walk
from lora.forward.decoder.row_recorder import Row, RowRecorder, row_product
from lora.forward.decoder.step_inputs import StepInputs
from lora.forward.decoder.step_tensors import StepActivations, StepHead
from lora.forward.gather import gather_rows
from lora.forward.int_row import to_int_row
from lora.forward.model.factors import Factors
from lora.forward.model.frozen_model import Model
from lora.forward.product import Product
from lora.forward.rmsnorm import rmsnorm
from lora.forward.token_rows import of_tokens, token_columns
from lora.shaders.program import Program
from lora.shaders.recording import Recording


def allocate_caches(recording: Recording, model: Model, room: int) -> tuple[Any, ...]:
    """What each layer keeps of one text of up to `room` tokens for the tokens after it."""
    found: list[Any] = []
    for spec in model.architecture.layers:
        cache = BLOCKS[type(spec.mixer)].cache
        if spec.keys_of is not None:
            found.append(found[spec.keys_of])
            continue
        found.append(None if cache is None else cache(recording, spec.mixer, room))
    return tuple(found)


@dataclass(frozen=True)
class Step:
    """One run of new tokens under one adapter.

    Attributes:
        factors: of the adapter; empty for the bare model.
        caches: from `allocate_caches`.
        opening: whether the text begins with them.
        few: whether they are fewer than matrix units attend with (`FEWEST_ROWS`).
    """

    model: Model
    inputs: StepInputs
    factors: Factors
    act: StepActivations
    caches: tuple[Any, ...]
    opening: bool = False
    few: bool = False


def record_step(program: Program, step: Step) -> None:
    """Appends the new tokens' way through embedding and layers: act.x from inputs.

    What the layers keep of them is left in the caches. One row on a GPU takes kernels of its own,
    in as few dispatches as there can be (`record_row_layer`).
    """
    model, inputs, act = step.model, step.inputs, step.act
    record_embedding(program, model, inputs.tokens, inputs.rows, act.x, step.factors)
    record_per_layer_inputs(program, model, act.x, inputs.table_rows, act.per_layer)
    layers = range(model.architecture.n_layers)
    if _fused(program, step):
        record_first_row(program, model, act)
        for layer in layers:
            cache = step.caches[layer]
            recorder = RowRecorder(
                program, model, layer, inputs, step.factors, act.memory, cache, act.per_layer
            )
            with program.scope(f"layers.{layer}"):
                record_row_layer(recorder, act)
        return
    context = AfterCache(inputs, step.caches, act.per_layer, step.opening, step.few)
    walk = Walk(model, step.factors, context)
    acts = {}
    for layer in layers:
        z = {
            group: act.memory.z(program.recording, lora)
            for (of_layer, group), lora in step.factors.items()
            if of_layer == layer
        }
        products = {
            group: act.memory.product(program.recording, model.layers[layer].matrices[group])
            for (of_layer, group), lora in step.factors.items()
            if of_layer == layer and lora.dora is not None
        }
        acts[layer] = replace(act.of(model.layers[layer].spec), z=z, products=products)
    record_layers(program, walk, acts, [act.x] * (len(acts) + 1))


def _fused(program: Program, step: Step) -> bool:
    """Whether the step is one row that takes kernels of its own, which scale no columns (DoRA)."""
    scaled = any(lora.dora is not None for lora in step.factors.values())
    return step.inputs.rows.maximum == 1 and fuses(program.recording) and not scaled


def record_step_head(program: Program, step: Step, head: StepHead) -> None:
    """Appends the logits of the last new token, and which of them is the largest."""
    model, inputs, act = step.model, step.inputs, step.act
    a = model.architecture
    with program.scope("head"):
        last = act.x
        if inputs.rows.maximum > 1:
            last = gather_rows(program, act.x, inputs.last_row, head.row, out=head.last)
        if fuses(program.recording):
            row = row_into(program, model, act, a.n_layers, last)
            if not _fused(program, step) and row.ints is not None:
                to_int_row(program, last, row.ints)
        else:
            row = Row(rmsnorm(program, last, model.output_norm, out=head.normed))
        lora = step.factors.get((a.n_layers, "head"))
        logits = Product(row.values, model.head, lora=lora, softcap=a.logit_softcap)
        row_product(program, row, logits, head.logits, label="logits")
        tokens = step.factors.tokens
        if tokens is not None and tokens.in_head:
            plain = replace(row, ints=None)  # trained rows are f32
            own = head.own(program.recording, tokens)
            product = of_tokens(program, logits, tokens)
            row_product(program, plain, product, own, label="logits.tokens")
            token_columns(program, tokens, own, head.logits, take=False)
        argmax(program, head.logits, head.token, length=a.vocab_size)
