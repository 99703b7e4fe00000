"""The decoder's backward pass, recorded from the head down to the lowest adapted layer."""

from __future__ import annotations

from lora.backward.before import AddBefore, Before
from lora.backward.blocks import BLOCKS_BACKWARD
from lora.backward.lora import lora_gradients, lora_project_gradient, scales_columns
from lora.backward.losses import Loss, LossTensors
from lora.backward.matmul import matmul_backward
from lora.backward.recorder import (
    BackwardPass,
    BackwardRecorder,
    InputGradient,
    StreamGradient,
)
from lora.backward.rmsnorm import NormBefore, picked_rmsnorm_backward, rmsnorm_backward
from lora.backward.token_rows import logits_gradient, logits_input_gradient, take_logits
from lora.forward.cross_entropy import gradient_in_blocks
from lora.forward.decoder.head import (
    HeadActivations,
    chunk_of,
    head_dropout,
    own_logits,
    record_chunk_loss,
    record_head_input,
    record_logits,
)
from lora.forward.decoder.layers import LayerActivations
from lora.forward.model.layer_spec import BlockSpec
from lora.forward.model.norm import Norm
from lora.forward.part_product import SizedRows
from lora.forward.scale_rows import scale_rows
from lora.forward.sums import sum_into
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor


def record_head_backward(
    program: Program,
    shared: BackwardPass,
    act: HeadActivations,
    x: Tensor,
    loss: Loss,
    tensors: LossTensors,
    loss_sum: Tensor,
    *,
    lowest: bool,
) -> None:
    """Appends the head, its loss, and the gradient to x (into scratch.d_x), chunk by chunk.

    The logits of a chunk become their own gradient, and that the gradient to the chunk's input,
    at once: nothing of size targets × vocab_size is stored (as in Liger-Kernel's fused linear
    cross-entropy). A loss that reads log-probabilities comes after those of all chunks.

    Args:
        x: [rows, hidden_size], the output of the last layer.
        loss: what writes `tensors.weights`.
        loss_sum: [n]; the sum of losses is added to the first.
        lowest: nothing below is adapted: stop after the gradients of the head's own factors.
    """
    model, inputs, scratch = shared.model, shared.inputs, shared.scratch
    key = (model.architecture.n_layers, "head")
    lora = shared.factors.get(key)
    chunks = range(len(inputs.chunks))
    with program.scope("head"):
        record_head_input(program, model, inputs, act, x)
        logits: Tensor | None = None
        if loss.reads_losses:
            for index in chunks:
                logits = record_logits(
                    program, model, inputs, shared.factors, act, index, shared.dropout
                )
                record_chunk_loss(program, model, inputs, act, index, logits, None)
        with program.scope("loss"):
            loss.record(program, tensors)
        for index in chunks:
            if logits is None or len(chunks) > 1:
                logits = record_logits(
                    program, model, inputs, shared.factors, act, index, shared.dropout
                )
            record_chunk_loss(
                program, model, inputs, act, index, logits, tensors.weights, shared.criterion
            )
            d_logits, d_z, dropout = logits, None, None
            if lora is not None and scratch.d_head_z is not None and act.z is not None:
                d_z = chunk_of(scratch.d_head_z, inputs, index)
                normed, z = (chunk_of(t, inputs, index) for t in (act.normed, act.z))
                lora_project_gradient(program, d_logits, lora, out=d_z)
                if shared.dropout is not None:
                    dropout = head_dropout(shared.dropout, model, inputs, index)
                slices = shared.gradients[key]
                lora_gradients(program, normed, z, d_logits, d_z, lora, slices, dropout=dropout)
            # Behind the gradients of the head's factors, which add to all columns.
            tokens, own = shared.factors.tokens, own_logits(act, inputs, index)
            if tokens is not None and own is not None and shared.d_tokens is not None:
                take_logits(program, d_logits, tokens, own)
                normed = chunk_of(act.normed, inputs, index)
                logits_gradient(program, normed, own, tokens, shared.d_tokens)
            if not lowest:
                out = chunk_of(scratch.d_head_normed, inputs, index)
                if act.halves:  # no factors, nor rows of tokens
                    halves = gradient_in_blocks(d_logits)
                    matmul_backward(program, halves, model.head, out=out, label="head_backward")
                else:
                    gradient = InputGradient(d_logits, model.head, lora, d_z, dropout)
                    gradient.record(program, out, None, "head_backward")
                if tokens is not None and own is not None:
                    logits_input_gradient(program, own, tokens, out)
        sum_into(program, act.losses, inputs.targets, loss_sum, 0)
        if lowest:
            return
        asked = _asks_below(program.recording, shared, model.architecture.n_layers)
        picked_rmsnorm_backward(
            program, act.picked, model.output_norm, scratch.d_head_normed, inputs.target_slots,
            scratch.stream.write(asked=asked),
        )  # fmt: skip


def _asks(recording: Recording, shared: BackwardPass, layer: int, block: BlockSpec) -> bool:
    """Whether a block's last product reads the stream's gradient as it is, and may want its sizes.

    Not behind a post norm, nor where DoRA scales its columns in a kernel of its own.
    """
    weights = shared.model.layers[layer]
    norm = weights.post_feed_forward_norm
    if block is not weights.spec.feed_forward:
        mixer = block is weights.spec.mixer
        norm = weights.post_mixer_norm if mixer else weights.post_per_layer_norm
    lora = shared.factors.get((layer, block.matrices[-1].group))
    if lora is None or lora.dora is None:
        return norm is None
    return norm is None and scales_columns(recording, shared.inputs.rows.maximum, lora)


def _asks_below(recording: Recording, shared: BackwardPass, layer: int) -> bool:
    """The same of the last block of the layer below one, or below the head (n_layers)."""
    if layer == 0:
        return False
    below = shared.model.layers[layer - 1]
    return below.output_scale is None and _asks(recording, shared, layer - 1, below.spec.blocks[-1])


def _before(x: Tensor, norm: Norm | None, stream: StreamGradient, asked: bool) -> Before:
    """What lies before a block: the norm of the residual stream, or the stream itself.

    Args:
        asked: whether the product that reads the stream's gradient next wants its sizes.
    """
    if norm is None:
        return AddBefore(stream.write().rows)
    return NormBefore(x, norm, stream.write(asked=asked), residual=stream.rows)


def record_layer_backward(
    program: Program,
    shared: BackwardPass,
    layer: int,
    act: LayerActivations,
    x: Tensor,
    *,
    lowest: bool,
    waits: bool = False,
) -> None:
    """Appends one layer's backward: scratch.d_x goes from its output to its input.

    Gradients of A and B are added to `gradients`. Activations of the blocks may be overwritten.

    Args:
        act: the layer's activations, just computed or kept.
        x: [rows, hidden_size], the layer's input.
        lowest: nothing below is adapted: stop after the layer's last adapted matrix.
        waits: whether the gradients of its lowest group may wait for the next layer's
            (`PendingGradients`), before which nothing may be run again.
    """
    with program.scope(f"layers.{layer}"):
        _record_blocks_backward(program, shared, layer, act, x, lowest=lowest)
        if not waits:
            shared.pending.flush(program)


def _record_blocks_backward(
    program: Program,
    shared: BackwardPass,
    layer: int,
    act: LayerActivations,
    x: Tensor,
    *,
    lowest: bool,
) -> None:
    """Appends the backward of a layer's blocks, from the last down."""
    scratch, weights = shared.scratch, shared.model.layers[layer]
    spec = weights.spec

    stream = scratch.stream

    def below_norm(source: Tensor | None, norm: Norm | None) -> SizedRows:
        """The gradient to what a post norm was given; without one, of the stream itself."""
        if source is None or norm is None or scratch.d_output is None:
            return stream.read()
        rmsnorm_backward(program, source, norm, stream.rows, out=scratch.d_output)
        return SizedRows(scratch.d_output, None)

    # Where this is the lowest adapted layer, what lies below its lowest adapted group is not run.
    adapted = [group for group in spec.groups if (layer, group) in shared.factors]
    recorder = BackwardRecorder(
        program, shared, layer, act.z, adapted[0] if lowest else "", act.products, act.shares
    )
    if weights.output_scale is not None:
        scale_rows(
            program, stream.write().rows, weights.output_scale, label="output_scale_backward"
        )
    if spec.per_layer is not None and act.after_feed_forward is not None:
        d_output = below_norm(act.per_layer_output, weights.post_per_layer_norm)
        record, source = BLOCKS_BACKWARD[type(spec.per_layer)].record, act.after_feed_forward
        before = _before(source, None, stream, asked=False)
        if not record(recorder, spec.per_layer, act.per_layer, source, d_output, before):
            return
    d_output = below_norm(act.feed_forward_output, weights.post_feed_forward_norm)
    asked = _asks(program.recording, shared, layer, spec.mixer)
    before = _before(act.middle, weights.feed_forward_norm, stream, asked)
    record = BLOCKS_BACKWARD[type(spec.feed_forward)].record
    if not record(
        recorder,
        spec.feed_forward,
        act.feed_forward,
        act.middle_normed or act.middle,
        d_output,
        before,
    ):
        return
    d_output = below_norm(act.mixer_output, weights.post_mixer_norm)
    asked = _asks_below(program.recording, shared, layer)
    before = _before(x, weights.mixer_norm, stream, asked)
    record = BLOCKS_BACKWARD[type(spec.mixer)].record
    record(recorder, spec.mixer, act.mixer, act.normed or x, d_output, before)
