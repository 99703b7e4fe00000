"""Gradient of attention as a block of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from lora.backward.attention import Attended, attention_backward
from lora.backward.before import Before
from lora.backward.head_gate import HeadGateBefore
from lora.backward.head_norm_rope import head_norm_rope_backward
from lora.backward.recorder import BackwardRecorder
from lora.backward.rope import rope_backward
from lora.backward.span_norm import span_norm_backward
from lora.forward.copy_columns import copy_columns
from lora.forward.decoder.attention_block import (
    AttentionActivations,
    head_norms,
    rotation_of,
    spans_of,
    turned_heads,
    warm_queries,
)
from lora.forward.heads import Heads
from lora.forward.model.layer_spec import LATE_NORM, SPAN_NORMS, Attention
from lora.forward.part_product import SizedRows
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor


@dataclass(frozen=True)
class AttentionGradients:
    """Gradients of the block's activations."""

    d_attended: Tensor  # [rows, query_size]
    d_qkv: Tensor  # [rows, qkv_size]
    d_raw: Tensor  # [rows, projected_size], below norms; d_qkv itself where these are in place
    dots: Tensor  # f32 [rows, n_heads], D of the attention's backward


def allocate_attention_gradients(
    recording: Recording, spec: Attention, rows: Extent
) -> AttentionGradients:
    """Tensors for up to rows.maximum rows."""

    def tensor(width: int, dtype: str = recording.precision) -> Tensor:
        return recording.memory.empty((rows.maximum, width), dtype, extent=rows)

    d_qkv = tensor(spec.qkv_size)
    d_raw = d_qkv if spec.projected_size == spec.qkv_size else tensor(spec.projected_size)
    return AttentionGradients(tensor(spec.query_size), d_qkv, d_raw, tensor(spec.n_heads, "f32"))


def _shares_keys(layer: BackwardRecorder, spec: Attention) -> bool:
    """Whether the layer's keys and values are another's, or another takes them."""
    return spec.keys_of is not None or layer.layer in layer.shared.scratch.d_kept


def _share_gradients(layer: BackwardRecorder, spec: Attention, d_qkv: Tensor) -> None:
    """Appends: gradients of keys and values go to the layer that they are of, which adds them.

    The last layer that takes them comes first, and writes what the others add to.
    """
    kept, first, n_columns = layer.shared.scratch.d_kept, spec.query_size, 2 * spec.kv_size
    if spec.keys_of is not None and spec.keys_of in kept:
        others = layer.layer != layer.shared.model.architecture.donors[spec.keys_of]
        copy_columns(
            layer.program, d_qkv, first, kept[spec.keys_of], 0, n_columns, accumulate=others,
            label="shared_kv_backward",
        )  # fmt: skip
    elif layer.layer in kept:
        copy_columns(
            layer.program, kept[layer.layer], 0, d_qkv, first, n_columns, accumulate=True,
            label="kept_kv_backward",
        )  # fmt: skip


def record_attention_backward(
    layer: BackwardRecorder, spec: Attention, act: AttentionActivations, normed: Tensor,
    d_output: SizedRows, before: Before,
) -> bool:  # fmt: skip
    """Appends the block's backward; see `BlockBackward`."""
    program, inputs, weights = layer.program, layer.shared.inputs, layer.weights
    scratch, heads = layer.scratch(spec), Heads.of(spec)
    gate = None
    if act.gated is not None and act.raw_qkv is not None:
        gate = HeadGateBefore(act.raw_qkv, act.attended, spec.head_size, scratch.d_raw)
    gated = act.gated or act.attended
    if not layer.through("attn_output", gated, d_output, scratch.d_attended, gate):
        return False
    attended = Attended(act.qkv, act.attended, act.lse)
    rotation, norms = rotation_of(weights, spec, inputs.positions), head_norms(weights)
    # Nothing comes between: no norm, no gradient of other layers.
    at_once = act.raw_qkv is None and not _shares_keys(layer, spec)
    attention_backward(
        program, attended, scratch.d_attended, inputs.segments, heads, d_qkv=scratch.d_qkv,
        dots=scratch.dots, rotation=rotation if at_once else None,
    )  # fmt: skip
    _share_gradients(layer, spec, scratch.d_qkv)
    if act.raw_qkv is not None and norms is not None:
        head_norm_rope_backward(program, act.raw_qkv, norms, rotation, heads, scratch.d_qkv)
    else:
        late = spec.qk_norm == LATE_NORM
        turning = turned_heads(spec)
        if not late and not at_once:
            rope_backward(program, scratch.d_qkv, rotation, turning, spec.head_size)
        if spec.norms_spans and act.raw_qkv is not None:
            # In place what isn't normed stays; where k is v, too, what comes by v is added to it.
            in_place = scratch.d_raw is scratch.d_qkv
            spans = [span for span in spans_of(spec) if span.normed or not in_place]
            parts = [spans[:-1], spans[-1:]] if spec.keys_are_values else [spans]
            for number, part in enumerate(parts):
                span_norm_backward(
                    program, act.raw_qkv, weights.vectors[SPAN_NORMS], weights.spec.norm_epsilon,
                    part, scratch.d_qkv, scratch.d_raw, accumulate=number > 0,
                )  # fmt: skip
        if late:
            rope_backward(program, scratch.d_qkv, rotation, turning, spec.head_size)
    warm_queries(program, weights, spec, scratch.d_qkv, inputs.positions)
    return layer.through("qkv", normed, scratch.d_raw, layer.shared.scratch.d_normed, before)
