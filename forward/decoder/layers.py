"""The decoder's forward pass, recorded layer by layer; one decoder for all architectures."""

from __future__ import annotations

from dataclasses import dataclass

from lora.forward.attention import attention
from lora.forward.embedding import embedding
from lora.forward.head_norm_rope import head_norm_rope
from lora.forward.heads import HeadNorms, Heads, Rotation
from lora.forward.lora import lora_project
from lora.forward.matmul import matmul
from lora.forward.model.adapter import Factors
from lora.forward.model.frozen_model import Model
from lora.forward.model.inputs import Inputs
from lora.forward.model.weights import FrozenMatrix
from lora.forward.product import Product
from lora.forward.rmsnorm import NormAfter, rmsnorm
from lora.forward.rope import rope
from lora.forward.swiglu import swiglu
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor


@dataclass(frozen=True)
class LayerActivations:
    """What one layer computes on the way and its backward reads again.

    Of the device's precision, but for the residual stream, the low-rank parts and the log-sum-exp,
    which are f32 always.
    """

    normed: Tensor  # [rows, hidden_size]
    z_qkv: Tensor | None  # [rows, members · rank], as the other z
    raw_qkv: Tensor | None  # [rows, qkv_size], before the norm of its heads, with qk_norm
    qkv: Tensor  # [rows, qkv_size], q and k normed and rotated
    attended: Tensor  # [rows, query_size]
    lse: Tensor  # [rows, n_heads]
    z_attn_output: Tensor | None
    projected: Tensor | None  # [rows, hidden_size], what attention gives, with post_norms
    middle: Tensor  # [rows, hidden_size], the residual stream after attention
    middle_normed: Tensor  # [rows, hidden_size]
    z_gate_up: Tensor | None
    gate_up: Tensor  # [rows, 2 · intermediate_size]
    gated: Tensor  # [rows, intermediate_size]
    z_down: Tensor | None
    ffn_output: Tensor | None  # [rows, hidden_size], with post_norms

    @classmethod
    def allocate(
        cls, recording: Recording, model: Model, inputs: Inputs, factors: Factors, layer: int
    ) -> LayerActivations:
        """Tensors for one layer; layers of the same adapted groups can share them."""
        a = model.architecture

        def tensor(width: int, dtype: str = recording.precision) -> Tensor:
            return recording.memory.empty((inputs.rows.maximum, width), dtype, extent=inputs.rows)

        def z(group: str) -> Tensor | None:
            lora = factors.get((layer, group))
            return None if lora is None else tensor(lora.n_members * lora.rank, "f32")

        return cls(
            normed=tensor(a.hidden_size),
            z_qkv=z("qkv"),
            raw_qkv=tensor(a.qkv_size) if a.qk_norm else None,
            qkv=tensor(a.qkv_size),
            attended=tensor(a.query_size),
            lse=tensor(a.n_heads, "f32"),
            z_attn_output=z("attn_output"),
            projected=tensor(a.hidden_size) if a.post_norms else None,
            middle=tensor(a.hidden_size, "f32"),
            middle_normed=tensor(a.hidden_size),
            z_gate_up=z("gate_up"),
            gate_up=tensor(2 * a.intermediate_size),
            gated=tensor(a.intermediate_size),
            z_down=z("down"),
            ffn_output=tensor(a.hidden_size) if a.post_norms else None,
        )


def record_embedding(program: Program, model: Model, inputs: Inputs, x: Tensor) -> None:
    """Appends x = the tokens' embeddings, [rows, hidden_size]."""
    scale = model.architecture.embedding_scale
    embedding(program, inputs.tokens, model.embedding, inputs.rows, scale=scale, out=x)


def record_layer(
    program: Program,
    model: Model,
    layer: int,
    inputs: Inputs,
    factors: Factors,
    act: LayerActivations,
    x: Tensor,
    out: Tensor | None,
) -> None:
    """Appends one decoder layer: out = x + attention + feed-forward.

    Args:
        factors: the adapters; empty for the bare model.
        act: where the intermediate results go.
        x: [rows, hidden_size], kept for the backward.
        out: [rows, hidden_size]; None leaves out what only the output needs (recompute).
    """
    a, weights = model.architecture, model.layers[layer]
    heads = Heads.of(a, layer)
    interleaved = a.layer_kinds[layer].rope.interleaved
    rotation = Rotation(inputs.positions, weights.rope, interleaved)

    def adapted(
        source: Tensor,
        matrix: FrozenMatrix,
        group: str,
        z: Tensor | None,
        to: Tensor | None,
        residual: Tensor | None = None,
        norm: NormAfter | None = None,
    ) -> None:
        lora = factors.get((layer, group))
        if lora is not None:
            lora_project(program, source, lora, out=z, label=f"{group}.z")
        if to is not None:
            matmul(
                program,
                Product(
                    source,
                    matrix,
                    lora=lora,
                    z=z,
                    bias=weights.biases.get(group),
                    residual=residual,
                ),
                out=to,
                norm=norm,
                label=group,
            )

    with program.scope(f"layers.{layer}"):
        rmsnorm(program, x, weights.attn_norm, a.norm_epsilon, out=act.normed)
        adapted(act.normed, weights.qkv, "qkv", act.z_qkv, act.raw_qkv or act.qkv)
        if act.raw_qkv is not None and weights.q_norm is not None and weights.k_norm is not None:
            norms = HeadNorms(weights.q_norm, weights.k_norm, a.norm_epsilon)
            head_norm_rope(program, act.raw_qkv, norms, rotation, heads, out=act.qkv)
        else:
            rope(program, act.qkv, rotation, a.n_heads + a.n_kv_heads, a.head_size)
        attention(program, act.qkv, inputs.segments, heads, out=act.attended, lse=act.lse)
        z = act.z_attn_output
        ffn_norm = NormAfter(weights.ffn_norm, a.norm_epsilon, act.middle_normed)
        if act.projected is not None and weights.post_attention_norm is not None:
            adapted(
                act.attended, weights.attn_output, "attn_output", z, act.projected,
                norm=NormAfter(weights.post_attention_norm, a.norm_epsilon, act.middle, residual=x),
            )  # fmt: skip
            ffn_norm.record(program, act.middle)
        else:
            adapted(
                act.attended, weights.attn_output, "attn_output", z, act.middle, x, norm=ffn_norm
            )
        adapted(act.middle_normed, weights.gate_up, "gate_up", act.z_gate_up, act.gate_up)
        swiglu(program, act.gate_up, activation_name=a.activation, out=act.gated)
        if act.ffn_output is None or weights.post_ffn_norm is None:
            adapted(act.gated, weights.down, "down", act.z_down, out, act.middle)
            return
        # The norm's backward reads what it was given: recompute needs the product too.
        norm = None
        if out is not None:
            norm = NormAfter(weights.post_ffn_norm, a.norm_epsilon, out, residual=act.middle)
        adapted(act.gated, weights.down, "down", act.z_down, act.ffn_output, norm=norm)
