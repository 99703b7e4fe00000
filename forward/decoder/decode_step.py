"""New tokens of a text through the decoder, attending to the cache: many at once or one."""

from __future__ import annotations

from lora.forward.argmax import argmax
from lora.forward.attention_decode import attention_decode
from lora.forward.decoder.decode_row import fuses, record_first_row, record_row_layer, row_product
from lora.forward.decoder.step_tensors import Row, StepActivations, StepHead, StepInputs
from lora.forward.embedding import embedding
from lora.forward.gather import gather_rows
from lora.forward.head_norm_rope import head_norm_rope
from lora.forward.heads import HeadNorms, Heads, Rotation
from lora.forward.int_row import to_int_row
from lora.forward.lora import lora_project
from lora.forward.matmul import matmul
from lora.forward.matmul_row import matmul_row
from lora.forward.model.adapter import Factors
from lora.forward.model.frozen_model import Model
from lora.forward.model.kv_cache import KeyValueCache, store_keys_values
from lora.forward.model.weights import FrozenMatrix
from lora.forward.product import Product
from lora.forward.rmsnorm import rmsnorm
from lora.forward.rope import rope
from lora.forward.swiglu import swiglu
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


def record_step(
    program: Program,
    model: Model,
    inputs: StepInputs,
    factors: Factors,
    act: StepActivations,
    cache: KeyValueCache,
) -> None:
    """Appends the new tokens' way through embedding and layers: act.x from inputs.

    Their keys and values are left in the cache. One row takes kernels of its own: products that
    read each weight once, and on a GPU as few dispatches as there can be (`record_row_layer`).
    """
    scale = model.architecture.embedding_scale
    embedding(program, inputs.tokens, model.embedding, inputs.rows, scale=scale, out=act.x)
    record = _record_layer
    if inputs.rows.maximum == 1 and fuses(program.recording):
        record = record_row_layer
        record_first_row(program, model, act)
    for layer in range(model.architecture.n_layers):
        with program.scope(f"layers.{layer}"):
            record(program, model, layer, inputs, factors, act, cache)


def record_step_head(
    program: Program,
    model: Model,
    inputs: StepInputs,
    factors: Factors,
    act: StepActivations,
    head: StepHead,
) -> None:
    """Appends the logits of the last new token, and which of them is the largest."""
    a = model.architecture
    with program.scope("head"):
        last = act.x
        if inputs.rows.maximum > 1:
            last = gather_rows(program, act.x, inputs.last_row, head.row, out=head.last)
        if fuses(program.recording):
            row = act.row_before(program.recording, "x", last, model.head, model.output_norm)
            if inputs.rows.maximum > 1 and row.ints is not None:
                to_int_row(program, last, row.ints)
        else:
            row = Row(rmsnorm(program, last, model.output_norm, a.norm_epsilon, out=head.normed))
        lora = factors.get((a.n_layers, "head"))
        logits = Product(row.values, model.head, lora=lora, softcap=a.logit_softcap)
        row_product(program, row, logits, a.norm_epsilon, head.logits, label="logits")
        argmax(program, head.logits, head.token, length=a.vocab_size)


def _record_layer(
    program: Program,
    model: Model,
    layer: int,
    inputs: StepInputs,
    factors: Factors,
    act: StepActivations,
    cache: KeyValueCache,
) -> None:
    """Appends one decoder layer, in place: act.x += attention, act.x += feed-forward."""
    a, weights = model.architecture, model.layers[layer]
    heads = Heads.of(a, layer)
    interleaved = a.layer_kinds[layer].rope.interleaved
    rotation = Rotation(inputs.rope_rows, weights.rope, interleaved)
    record = matmul_row if inputs.rows.maximum == 1 else matmul

    def adapted(
        source: Tensor, matrix: FrozenMatrix, group: str, to: Tensor, residual: Tensor | None = None
    ) -> None:
        lora, z = factors.get((layer, group)), None
        if lora is not None:
            to_z = act.z(program.recording, lora)
            z = lora_project(program, source, lora, out=to_z, label=f"{group}.z")
        product = Product(
            source, matrix, lora=lora, z=z, bias=weights.biases.get(group), residual=residual
        )
        record(program, product, out=to, label=group)

    def block_end(
        source: Tensor,
        matrix: FrozenMatrix,
        group: str,
        post_norm: Tensor | None,
        residual: Tensor,
        to: Tensor,
    ) -> None:
        """to = residual + the block's last product, normed where the model has post_norms."""
        if act.block_output is None or post_norm is None:
            adapted(source, matrix, group, to, residual)
            return
        adapted(source, matrix, group, act.block_output)
        rmsnorm(
            program, act.block_output, post_norm, a.norm_epsilon, residual=residual, out=to
        )  # fmt: skip

    rmsnorm(program, act.x, weights.attn_norm, a.norm_epsilon, out=act.normed)
    adapted(act.normed, weights.qkv, "qkv", act.raw_qkv or act.qkv)
    if act.raw_qkv is not None and weights.q_norm is not None and weights.k_norm is not None:
        norms = HeadNorms(weights.q_norm, weights.k_norm, a.norm_epsilon)
        head_norm_rope(program, act.raw_qkv, norms, rotation, heads, out=act.qkv)
    else:
        rope(program, act.qkv, rotation, a.n_heads + a.n_kv_heads, a.head_size)
    layer_cache = cache.layers[layer]
    store_keys_values(program, act.qkv, inputs.positions, layer_cache, query_size=a.query_size)
    attention_decode(program, act.qkv, inputs.positions, layer_cache, heads, out=act.attended)
    block_end(
        act.attended, weights.attn_output, "attn_output", weights.post_attention_norm, act.x,
        act.middle,
    )  # fmt: skip
    rmsnorm(program, act.middle, weights.ffn_norm, a.norm_epsilon, out=act.normed)
    adapted(act.normed, weights.gate_up, "gate_up", act.gate_up)
    swiglu(program, act.gate_up, activation_name=a.activation, out=act.gated)
    block_end(act.gated, weights.down, "down", weights.post_ffn_norm, act.middle, act.x)
