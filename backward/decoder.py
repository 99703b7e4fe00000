"""The decoder's backward pass, recorded from the head down to the lowest adapted layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora.backward.attention import Attended, attention_backward
from lora.backward.head_norm_rope import head_norm_rope_backward
from lora.backward.lora import lora_gradients, lora_project_gradient
from lora.backward.losses import Loss, LossTensors
from lora.backward.matmul import matmul_backward
from lora.backward.rmsnorm import NormBefore, rmsnorm_backward
from lora.backward.rope import rope_backward
from lora.backward.swiglu import swiglu_backward
from lora.forward.decoder.head import (
    HeadActivations,
    chunk_of,
    record_chunk_loss,
    record_head_input,
    record_logits,
)
from lora.forward.decoder.layers import LayerActivations
from lora.forward.gather import gather_rows
from lora.forward.heads import HeadNorms, Heads, Rotation
from lora.forward.model.adapter import Factors, LoraFactors
from lora.forward.model.frozen_model import Model
from lora.forward.model.inputs import Inputs
from lora.forward.model.weights import FrozenMatrix
from lora.forward.sums import sum_into
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

Gradients = Mapping[tuple[int, str], Sequence[LoraFactors]]  # the slices, by (layer, group)


@dataclass(frozen=True)
class Scratch:
    """Gradients of activations, shared by all layers; types as in LayerActivations."""

    d_x: Tensor  # [rows, hidden_size], the gradient to the residual stream, carried downwards
    d_normed: Tensor  # [rows, hidden_size]
    d_output: Tensor | None  # [rows, hidden_size], below a post norm, with post_norms
    d_gated: Tensor  # [rows, intermediate_size]
    d_attended: Tensor  # [rows, query_size]
    d_qkv: Tensor  # [rows, qkv_size]
    dots: Tensor  # [rows, n_heads], D of the attention's backward
    d_z: Mapping[int, Tensor]  # [rows, width], by width
    d_head_z: Tensor | None  # [targets, rank], where the head is adapted
    d_head_normed: Tensor  # [targets, hidden_size]
    d_picked: Tensor  # [targets, hidden_size]

    @classmethod
    def allocate(
        cls, recording: Recording, model: Model, inputs: Inputs, factors: Factors
    ) -> Scratch:
        """Tensors for the backward pass."""
        a = model.architecture

        def tensor(width: int, dtype: str = recording.precision) -> Tensor:
            return recording.memory.empty((inputs.rows.maximum, width), dtype, extent=inputs.rows)

        def over_targets(width: int) -> Tensor:
            return recording.memory.empty((inputs.targets.maximum, width), extent=inputs.targets)

        head = factors.get((a.n_layers, "head"))
        in_layers = [lora for (layer, _), lora in factors.items() if layer < a.n_layers]

        return cls(
            d_x=tensor(a.hidden_size, "f32"),
            d_normed=tensor(a.hidden_size),
            d_output=tensor(a.hidden_size) if a.post_norms else None,
            d_gated=tensor(a.intermediate_size),
            d_attended=tensor(a.query_size),
            d_qkv=tensor(a.qkv_size),
            dots=tensor(a.n_heads, "f32"),
            d_z={w: tensor(w, "f32") for w in {f.n_members * f.rank for f in in_layers}},
            d_head_z=None if head is None else over_targets(head.rank),
            d_head_normed=over_targets(a.hidden_size),
            d_picked=over_targets(a.hidden_size),
        )


@dataclass(frozen=True)
class BackwardPass:
    """What the head and all layers go backward with.

    Attributes:
        gradients: the slices that gradients of A and B are added to.
    """

    model: Model
    inputs: Inputs
    factors: Factors
    gradients: Gradients
    scratch: Scratch


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
                logits = record_logits(program, model, inputs, shared.factors, act, index)
                record_chunk_loss(program, model, inputs, act, index, logits, None)
        with program.scope("loss"):
            loss.record(program, tensors)
        for index in chunks:
            if logits is None or len(chunks) > 1:
                logits = record_logits(program, model, inputs, shared.factors, act, index)
            record_chunk_loss(program, model, inputs, act, index, logits, tensors.weights)
            d_logits, d_z = logits, None
            if lora is not None and scratch.d_head_z is not None and act.z is not None:
                d_z = chunk_of(scratch.d_head_z, inputs, index)
                normed, z = (chunk_of(t, inputs, index) for t in (act.normed, act.z))
                lora_project_gradient(program, d_logits, lora, out=d_z)
                lora_gradients(program, normed, z, d_logits, d_z, lora, shared.gradients[key])
            if not lowest:
                matmul_backward(
                    program, d_logits, model.head, lora=lora, d_z=d_z,
                    out=chunk_of(scratch.d_head_normed, inputs, index), label="head_backward",
                )  # fmt: skip
        sum_into(program, act.losses, inputs.targets, loss_sum, 0)
        if lowest:
            return
        rmsnorm_backward(
            program,
            act.picked,
            model.output_norm,
            model.architecture.norm_epsilon,
            scratch.d_head_normed,
            out=scratch.d_picked,
        )
        gather_rows(
            program, scratch.d_picked, inputs.target_slots, inputs.rows, out=scratch.d_x,
            label="gather_backward",
        )  # fmt: skip


def record_layer_backward(
    program: Program,
    shared: BackwardPass,
    layer: int,
    act: LayerActivations,
    x: Tensor,
    *,
    lowest: bool,
) -> None:
    """Appends one layer's backward: scratch.d_x goes from its output to its input.

    Gradients of A and B are added to `gradients`. act.gate_up is overwritten.

    Args:
        act: the layer's activations, just computed or kept.
        x: [rows, hidden_size], the layer's input.
        lowest: nothing below is adapted: stop after the layer's last adapted matrix.
    """
    model, inputs, factors = shared.model, shared.inputs, shared.factors
    gradients, scratch = shared.gradients, shared.scratch
    a, weights = model.architecture, model.layers[layer]
    heads = Heads.of(a, layer)
    interleaved = a.layer_kinds[layer].rope.interleaved
    rotation = Rotation(inputs.positions, weights.rope, interleaved)

    def below_norm(source: Tensor | None, weight: Tensor | None) -> Tensor:
        """The gradient to what a post norm was given; without one, of the stream itself."""
        if source is None or weight is None or scratch.d_output is None:
            return scratch.d_x
        return rmsnorm_backward(
            program, source, weight, a.norm_epsilon, scratch.d_x, out=scratch.d_output
        )

    def through(
        group: str,
        matrix: FrozenMatrix,
        source: Tensor,
        z: Tensor | None,
        d_y: Tensor,
        out: Tensor | None,
        norm: NormBefore | None = None,
    ) -> None:
        """The gradients of a group's factors, and of its input (None: not wanted) or its norm's."""
        lora = factors.get((layer, group))
        d_z = None
        if lora is not None and z is not None:
            d_z = scratch.d_z[lora.n_members * lora.rank]
            lora_project_gradient(program, d_y, lora, out=d_z)
            lora_gradients(program, source, z, d_y, d_z, lora, gradients[layer, group])
        if out is not None:
            matmul_backward(
                program, d_y, matrix, lora=lora, d_z=d_z, out=out, norm=norm,
                label=f"{group}_backward",
            )  # fmt: skip

    # Where this is the lowest adapted layer, what lies below its lowest adapted group is not run.
    adapted = [group for group in ("qkv", "attn_output", "gate_up", "down")
               if (layer, group) in factors]  # fmt: skip
    last = adapted[0] if lowest else ""
    d_x = scratch.d_x
    with program.scope(f"layers.{layer}"):
        through(
            "down", weights.down, act.gated, act.z_down,
            below_norm(act.ffn_output, weights.post_ffn_norm),
            None if last == "down" else scratch.d_gated,
        )  # fmt: skip
        if last == "down":
            return
        d_gate_up = swiglu_backward(
            program, act.gate_up, scratch.d_gated, activation_name=a.activation, out=act.gate_up
        )
        through(
            "gate_up", weights.gate_up, act.middle_normed, act.z_gate_up, d_gate_up,
            None if last == "gate_up" else scratch.d_normed,
            NormBefore(act.middle, weights.ffn_norm, a.norm_epsilon, d_x, residual=d_x),
        )  # fmt: skip
        if last == "gate_up":
            return
        through(
            "attn_output", weights.attn_output, act.attended, act.z_attn_output,
            below_norm(act.projected, weights.post_attention_norm),
            None if last == "attn_output" else scratch.d_attended,
        )  # fmt: skip
        if last == "attn_output":
            return
        attended = Attended(act.qkv, act.attended, act.lse)
        attention_backward(
            program, attended, scratch.d_attended, inputs.segments, heads, d_qkv=scratch.d_qkv,
            dots=scratch.dots,
        )  # fmt: skip
        if act.raw_qkv is not None and weights.q_norm is not None and weights.k_norm is not None:
            norms = HeadNorms(weights.q_norm, weights.k_norm, a.norm_epsilon)
            head_norm_rope_backward(program, act.raw_qkv, norms, rotation, heads, scratch.d_qkv)
        else:
            rope_backward(program, scratch.d_qkv, rotation, a.n_heads + a.n_kv_heads, a.head_size)
        through(
            "qkv", weights.qkv, act.normed, act.z_qkv, scratch.d_qkv,
            None if last == "qkv" else scratch.d_normed,
            NormBefore(x, weights.attn_norm, a.norm_epsilon, d_x, residual=d_x),
        )  # fmt: skip
