"""New tokens of a text through the decoder, attending to the cache: many at once or one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from forward.adapter import Factors, LoraFactors
from forward.argmax import argmax
from forward.attention_decode import (
    Heads,
    RowPlace,
    RowRope,
    attention_decode,
    attention_decode_row,
)
from forward.embedding import embedding
from forward.gather import gather_rows
from forward.head_norm_rope import head_norm_rope
from forward.kv_cache import KeyValueCache, store_keys_values
from forward.lora import lora_project
from forward.matmul import matmul
from forward.matmul_row import InputNorm, can_gate, matmul_row, project_row
from forward.model import Model
from forward.rmsnorm import rmsnorm
from forward.rope import rope
from forward.swiglu import swiglu
from forward.weights import FrozenMatrix
from shaders.device import Device
from shaders.program import Program
from shaders.tensor import Extent, Tensor

_ALIGNMENT = 64  # elements: the parts of StepInputs.words begin on 256 bytes


@dataclass(frozen=True)
class StepInputs:
    """What one run brings: up to `rows.maximum` new tokens, in one buffer written at once."""

    rows: Extent
    words: Tensor  # u32, all of the following
    tokens: Tensor  # u32 [rows]
    positions: Tensor  # u32 [rows], in the cache
    rope_rows: Tensor  # u32 [rows], in rope's tables; see LongExamples
    last_row: Tensor  # u32 [1], the row whose logits are wanted

    @classmethod
    def allocate(cls, device: Device, maximum_rows: int) -> StepInputs:
        """A buffer for runs of at most `maximum_rows` tokens."""
        rows = device.extent(maximum_rows)
        width = -(-maximum_rows // _ALIGNMENT) * _ALIGNMENT
        words = device.empty((3 * width + _ALIGNMENT,), "u32", purpose="inputs")

        def part(index: int, length: int) -> Tensor:
            return replace(words.rows(index * width, index * width + length), extent=rows)

        n = maximum_rows
        return cls(rows, words, part(0, n), part(1, n), part(2, n), part(3, 1))

    @property
    def place(self) -> RowPlace:
        """Where the row is, for the kernels of one row."""
        width = (self.words.size - _ALIGNMENT) // 3
        return RowPlace(self.words, position_at=width, rope_row_at=2 * width)

    def write(
        self, device: Device, tokens: list[int], first_position: int, first_rope_row: int
    ) -> None:
        """Writes tokens that stand one after another in the text.

        Args:
            first_position: of the first of them, in the cache.
            first_rope_row: its row in rope's tables.
        """
        n, width = len(tokens), (self.words.size - _ALIGNMENT) // 3
        if n < self.rows.maximum or n > 1:  # with one row at most, it is always in use
            device.set_rows(self.rows, n)
        values = np.zeros(self.words.size, np.uint32)
        values[:n] = tokens
        values[width : width + n] = np.arange(first_position, first_position + n)
        values[2 * width : 2 * width + n] = np.arange(first_rope_row, first_rope_row + n)
        values[3 * width] = n - 1
        device.write(self.words, values)


@dataclass(frozen=True)
class StepActivations:
    """What the layers compute on the way; every layer in the same tensors."""

    x: Tensor  # [rows, hidden_size], the residual stream
    normed: Tensor  # [rows, hidden_size], before attention and before the feed-forward block
    raw_qkv: Tensor | None  # [rows, qkv_size], before the norm of its heads, with qk_norm
    qkv: Tensor  # [rows, qkv_size]
    attended: Tensor  # [rows, query_size]
    block_output: Tensor | None  # [rows, hidden_size], before its norm, with post_norms
    middle: Tensor  # [rows, hidden_size], the residual stream after attention
    gate_up: Tensor  # [rows, 2 · intermediate_size]
    gated: Tensor  # [rows, intermediate_size]
    low: dict[int, Tensor] = field(default_factory=dict)  # z by its width: adapters differ in rank

    def z(self, device: Device, lora: LoraFactors) -> Tensor:
        """The tensor for the z of an adapted group."""
        width = lora.n_members * lora.rank
        if width not in self.low:
            shape = (self.x.shape[0], width)
            self.low[width] = device.empty(shape, extent=self.x.extent)
        return self.low[width]

    @classmethod
    def allocate(cls, device: Device, model: Model, rows: Extent) -> StepActivations:
        """Tensors for up to rows.maximum tokens."""
        a = model.architecture

        def tensor(width: int) -> Tensor:
            return device.empty((rows.maximum, width), extent=rows)

        return cls(
            x=tensor(a.hidden_size),
            normed=tensor(a.hidden_size),
            raw_qkv=tensor(a.qkv_size) if a.qk_norm else None,
            qkv=tensor(a.qkv_size),
            attended=tensor(a.query_size),
            block_output=tensor(a.hidden_size) if a.post_norms else None,
            middle=tensor(a.hidden_size),
            gate_up=tensor(2 * a.intermediate_size),
            gated=tensor(a.intermediate_size),
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
    def allocate(cls, device: Device, model: Model) -> StepHead:
        """Tensors for one row."""
        a = model.architecture
        row = device.extent(1)
        return cls(
            row=row,
            last=device.empty((1, a.hidden_size), extent=row),
            normed=device.empty((1, a.hidden_size), extent=row),
            logits=device.empty((1, a.logits_size), purpose="logits", extent=row),
            token=device.empty((1,), "u32", extent=row),
        )


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
    read each weight once, and on a GPU as few dispatches as there can be (`_record_row_layer`).
    """
    scale = model.architecture.embedding_scale
    embedding(program, inputs.tokens, model.embedding, inputs.rows, scale=scale, out=act.x)
    fused = inputs.rows.maximum == 1 and fuses(program.device)
    record = _record_row_layer if fused else _record_layer
    for layer in range(model.architecture.n_layers):
        with program.scope(f"layers.{layer}"):
            record(program, model, layer, inputs, factors, act, cache)


def fuses(device: Device) -> bool:
    """Whether one row's norms go into the products that follow them.

    A dispatch costs a GPU about as long as one of these products; an adapter on the CPU pays for
    the norm in every lane of the product instead.
    """
    return not device.is_cpu


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
        last, norm = act.x, None
        if inputs.rows.maximum > 1:
            last = gather_rows(program, act.x, inputs.last_row, head.row, out=head.last)
        if fuses(program.device):
            norm = InputNorm(model.output_norm, a.norm_epsilon)
        else:
            last = rmsnorm(program, last, model.output_norm, a.norm_epsilon, out=head.normed)
        lora = factors.get((a.n_layers, "head"))
        z = None if lora is None else project_row(program, last, lora, norm=norm)
        matmul_row(
            program, last, model.head, norm=norm, lora=lora, z=z, softcap=a.logit_softcap,
            out=head.logits, label="logits",
        )  # fmt: skip
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
    kind, heads = a.layer_kinds[layer], _heads(model, layer)
    product = matmul_row if inputs.rows.maximum == 1 else matmul

    def adapted(
        source: Tensor, matrix: FrozenMatrix, group: str, to: Tensor, residual: Tensor | None = None
    ) -> None:
        lora, z = factors.get((layer, group)), None
        if lora is not None:
            to_z = act.z(program.device, lora)
            z = lora_project(program, source, lora, out=to_z, label=f"{group}.z")
        product(
            program, source, matrix, lora=lora, z=z, bias=weights.biases.get(group),
            residual=residual, out=to, label=group,
        )  # fmt: skip

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
        head_norm_rope(
            program, act.raw_qkv, weights.q_norm, weights.k_norm, a.norm_epsilon,
            inputs.rope_rows, weights.rope, n_heads=a.n_heads, n_kv_heads=a.n_kv_heads,
            head_size=a.head_size, interleaved=kind.rope.interleaved, out=act.qkv,
        )  # fmt: skip
    else:
        rope(
            program,
            act.qkv,
            inputs.rope_rows,
            weights.rope,
            n_rotated_heads=a.n_heads + a.n_kv_heads,
            head_size=a.head_size,
            interleaved=kind.rope.interleaved,
        )
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


def _record_row_layer(
    program: Program,
    model: Model,
    layer: int,
    inputs: StepInputs,
    factors: Factors,
    act: StepActivations,
    cache: KeyValueCache,
) -> None:
    """Appends one decoder layer for one row, as `_record_layer` in six dispatches.

    Norms go into the product that follows them, the gate's activation into the one before it;
    heads are normed, turned and stored where attention reads them. An adapted group has one more
    dispatch (its z), a model with post_norms two.
    """
    a, weights = model.architecture, model.layers[layer]
    epsilon = a.norm_epsilon

    def adapted(
        source: Tensor,
        matrix: FrozenMatrix,
        group: str,
        to: Tensor,
        *,
        norm: Tensor | None = None,
        gate: str | None = None,
        residual: Tensor | None = None,
    ) -> None:
        lora, z = factors.get((layer, group)), None
        input_norm = None if norm is None else InputNorm(norm, epsilon)
        if lora is not None:
            to_z = act.z(program.device, lora)
            z = project_row(
                program, source, lora, norm=input_norm, out=to_z, label=f"{group}.z"
            )  # fmt: skip
        matmul_row(
            program, source, matrix, norm=input_norm, gate=gate, lora=lora, z=z,
            bias=weights.biases.get(group), residual=residual, out=to, label=group,
        )  # fmt: skip

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
            adapted(source, matrix, group, to, residual=residual)
            return
        adapted(source, matrix, group, act.block_output)
        rmsnorm(program, act.block_output, post_norm, epsilon, residual=residual, out=to)

    adapted(act.x, weights.qkv, "qkv", act.qkv, norm=weights.attn_norm)
    interleaved = a.layer_kinds[layer].rope.interleaved
    rope = RowRope(weights.rope, interleaved, weights.q_norm, weights.k_norm, epsilon)
    attention_decode_row(
        program, act.qkv, inputs.place, cache.layers[layer], _heads(model, layer), rope,
        out=act.attended,
    )  # fmt: skip
    block_end(
        act.attended, weights.attn_output, "attn_output", weights.post_attention_norm, act.x,
        act.middle,
    )  # fmt: skip
    if can_gate(weights.gate_up):
        adapted(
            act.middle, weights.gate_up, "gate_up", act.gated, norm=weights.ffn_norm,
            gate=a.activation,
        )  # fmt: skip
    else:
        adapted(act.middle, weights.gate_up, "gate_up", act.gate_up, norm=weights.ffn_norm)
        swiglu(program, act.gate_up, activation_name=a.activation, out=act.gated)
    block_end(act.gated, weights.down, "down", weights.post_ffn_norm, act.middle, act.x)


def _heads(model: Model, layer: int) -> Heads:
    """The heads of one layer, as the attention kernels take them."""
    a = model.architecture
    return Heads(
        n_heads=a.n_heads,
        n_kv_heads=a.n_kv_heads,
        head_size=a.head_size,
        scale=a.attention_scale,
        window=a.layer_kinds[layer].window,
        softcap=a.attention_softcap,
    )
