"""The decoder's forward pass, recorded layer by layer; one decoder for all architectures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from forward.adapter import LoraFactors
from forward.attention import attention
from forward.embedding import embedding
from forward.inputs import Inputs
from forward.lora import lora_project
from forward.matmul import matmul
from forward.model import Model
from forward.rmsnorm import rmsnorm
from forward.rope import rope
from forward.swiglu import swiglu
from forward.weights import FrozenMatrix
from shaders.device import Device
from shaders.program import Program
from shaders.tensor import Tensor

Factors = Mapping[tuple[int, str], LoraFactors]  # by (layer, group)


@dataclass(frozen=True)
class LayerActivations:
    """What one layer computes on the way and its backward reads again."""

    normed: Tensor  # [rows, hidden_size]
    z_qkv: Tensor | None  # [rows, members · rank], as the other z
    qkv: Tensor  # [rows, query_size + 2 · kv_size], q and k rotated
    attended: Tensor  # [rows, query_size]
    lse: Tensor  # [rows, n_heads]
    z_attn_output: Tensor | None
    middle: Tensor  # [rows, hidden_size], the residual stream after attention
    middle_normed: Tensor  # [rows, hidden_size]
    z_gate_up: Tensor | None
    gate_up: Tensor  # [rows, 2 · intermediate_size]
    gated: Tensor  # [rows, intermediate_size]
    z_down: Tensor | None

    @classmethod
    def allocate(
        cls, device: Device, model: Model, inputs: Inputs, factors: Factors, layer: int
    ) -> LayerActivations:
        """Tensors for one layer; layers of the same adapted groups can share them."""
        a = model.architecture

        def tensor(width: int) -> Tensor:
            return device.empty((inputs.rows.maximum, width), extent=inputs.rows)

        def z(group: str) -> Tensor | None:
            lora = factors.get((layer, group))
            return None if lora is None else tensor(lora.n_members * lora.rank)

        return cls(
            normed=tensor(a.hidden_size),
            z_qkv=z("qkv"),
            qkv=tensor(a.query_size + 2 * a.kv_size),
            attended=tensor(a.query_size),
            lse=tensor(a.n_heads),
            z_attn_output=z("attn_output"),
            middle=tensor(a.hidden_size),
            middle_normed=tensor(a.hidden_size),
            z_gate_up=z("gate_up"),
            gate_up=tensor(2 * a.intermediate_size),
            gated=tensor(a.intermediate_size),
            z_down=z("down"),
        )


def record_embedding(program: Program, model: Model, inputs: Inputs, x: Tensor) -> None:
    """Appends x = the tokens' embeddings, [rows, hidden_size]."""
    embedding(program, inputs.tokens, model.embedding, inputs.rows, out=x)


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
        out: [rows, hidden_size]; None leaves the last product out (recompute needs no output).
    """
    a, weights = model.architecture, model.layers[layer]

    def adapted(
        source: Tensor,
        matrix: FrozenMatrix,
        group: str,
        z: Tensor | None,
        to: Tensor | None,
        residual: Tensor | None = None,
    ) -> None:
        lora = factors.get((layer, group))
        if lora is not None:
            lora_project(program, source, lora, out=z, label=f"{group}.z")
        if to is not None:
            matmul(program, source, matrix, lora=lora, z=z, residual=residual, out=to, label=group)

    with program.scope(f"layers.{layer}"):
        rmsnorm(program, x, weights.attn_norm, a.norm_epsilon, out=act.normed)
        adapted(act.normed, weights.qkv, "qkv", act.z_qkv, act.qkv)
        rope(
            program,
            act.qkv,
            inputs.positions,
            model.rope,
            n_rotated_heads=a.n_heads + a.n_kv_heads,
            head_size=a.head_size,
            interleaved=a.rope_interleaved,
        )
        attention(
            program,
            act.qkv,
            inputs.segments,
            n_heads=a.n_heads,
            n_kv_heads=a.n_kv_heads,
            head_size=a.head_size,
            scale=a.head_size**-0.5,
            out=act.attended,
            lse=act.lse,
        )
        adapted(act.attended, weights.attn_output, "attn_output", act.z_attn_output, act.middle, x)
        rmsnorm(program, act.middle, weights.ffn_norm, a.norm_epsilon, out=act.middle_normed)
        adapted(act.middle_normed, weights.gate_up, "gate_up", act.z_gate_up, act.gate_up)
        swiglu(program, act.gate_up, out=act.gated)
        adapted(act.gated, weights.down, "down", act.z_down, out, act.middle)
