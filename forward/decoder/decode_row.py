"""One new token through the layers on a GPU, in as few dispatches as there can be: six a layer.

A dispatch costs a GPU about as long as one of these products. So norms go into the product that
follows them and the gate's activation into the one before it; heads are normed, turned and stored
where attention reads them; and what a quantized product takes (`IntRow`) is written by the dispatch
before it. An adapted group has one more dispatch (its z), a model with post_norms two a layer.
"""

from __future__ import annotations

from dataclasses import replace

from lora.forward.attention_decode import RowRope, attention_decode_row
from lora.forward.decoder.step_tensors import Row, StepActivations, StepInputs
from lora.forward.heads import Heads
from lora.forward.int_row import RowNorm, to_int_row
from lora.forward.matmul_int_row import matmul_int_row
from lora.forward.matmul_row import matmul_row, project_row
from lora.forward.model.adapter import Factors
from lora.forward.model.frozen_model import Model
from lora.forward.model.kv_cache import KeyValueCache
from lora.forward.model.weights import FrozenMatrix
from lora.forward.product import InputNorm, Product, can_gate
from lora.forward.rmsnorm import rmsnorm
from lora.forward.swiglu import swiglu
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor


def fuses(recording: Recording) -> bool:
    """Whether one row takes this way; a CPU device would pay for norms in every lane."""
    return not recording.facts.is_cpu


def row_product(
    program: Program,
    row: Row,
    product: Product,
    epsilon: float,
    out: Tensor,
    *,
    then: Row | None = None,
    label: str,
) -> None:
    """Appends a product by the kernel that takes the row, and its z before it.

    Args:
        product: of row.values, without the row's norm; its z is where z is to be written, a new
            tensor by default.
        epsilon: of the row's norm.
        then: the row that `out` becomes, where another product takes it.
    """
    norm = None if row.norm is None else InputNorm(row.norm, epsilon)
    if product.lora is not None:
        z = project_row(
            program, row.values, product.lora, norm=norm, out=product.z, label=f"{label}.z"
        )
        product = replace(product, z=z)
    ints = None if then is None else then.ints
    if row.ints is not None:
        whole = replace(product, x=row.ints)
        matmul_int_row(program, whole, epsilon=epsilon, out=out, int_out=ints, label=label)
    else:
        matmul_row(program, replace(product, norm=norm), out=out, label=label)
    if row.ints is None and ints is not None:
        to_int_row(program, out, ints)


def record_first_row(program: Program, model: Model, act: StepActivations) -> None:
    """Appends what the first layer takes of the embedded token, act.x."""
    first = model.layers[0]
    row = act.row_before(program.recording, "x", act.x, first.qkv, first.attn_norm)
    if row.ints is not None:
        to_int_row(program, act.x, row.ints)


def record_row_layer(
    program: Program,
    model: Model,
    layer: int,
    inputs: StepInputs,
    factors: Factors,
    act: StepActivations,
    cache: KeyValueCache,
) -> None:
    """Appends one decoder layer for one row, in place: act.x += attention, act.x += feed-forward.

    It finds act.x in the form that its first product takes, and leaves it as the next layer's (or
    the head's) takes it.
    """
    a, weights, recording = model.architecture, model.layers[layer], program.recording
    epsilon = a.norm_epsilon

    def product(
        row: Row,
        matrix: FrozenMatrix,
        group: str,
        out: Tensor,
        *,
        gate: str | None = None,
        residual: Tensor | None = None,
        then: Row | None = None,
    ) -> None:
        lora = factors.get((layer, group))
        z = None if lora is None else act.z(recording, lora)
        whole = Product(
            row.values, matrix, lora=lora, z=z, gate=gate, bias=weights.biases.get(group),
            residual=residual,
        )  # fmt: skip
        row_product(program, row, whole, epsilon, out, then=then, label=group)

    def block_end(
        row: Row,
        matrix: FrozenMatrix,
        group: str,
        post_norm: Tensor | None,
        residual: Tensor,
        then: Row,
    ) -> None:
        """then = residual + the block's last product, normed where the model has post_norms."""
        if act.block_output is None or post_norm is None:
            product(row, matrix, group, then.values, residual=residual, then=then)
            return
        product(row, matrix, group, act.block_output)
        if then.ints is not None:
            norm = RowNorm(post_norm, epsilon, then.values, residual)
            to_int_row(program, act.block_output, then.ints, norm=norm, label="post_norm")
        else:
            rmsnorm(
                program, act.block_output, post_norm, epsilon, residual=residual, out=then.values
            )  # fmt: skip

    x = act.row_before(recording, "x", act.x, weights.qkv, weights.attn_norm)
    product(x, weights.qkv, "qkv", act.qkv)
    attended = act.row_before(recording, "attended", act.attended, weights.attn_output)
    interleaved = a.layer_kinds[layer].rope.interleaved
    rope = RowRope(weights.rope, interleaved, weights.q_norm, weights.k_norm, epsilon)
    attention_decode_row(
        program, act.qkv, inputs.place, cache.layers[layer], Heads.of(a, layer), rope,
        out=act.attended, int_out=attended.ints,
    )  # fmt: skip
    # The whole numbers of middle may lie where those of x lay: qkv has read them.
    middle = act.row_before(recording, "x", act.middle, weights.gate_up, weights.ffn_norm)
    block_end(
        attended, weights.attn_output, "attn_output", weights.post_attention_norm, act.x, middle
    )
    gated = act.row_before(recording, "gated", act.gated, weights.down)
    if can_gate(weights.gate_up):
        product(middle, weights.gate_up, "gate_up", act.gated, gate=a.activation, then=gated)
    else:
        product(middle, weights.gate_up, "gate_up", act.gate_up)
        swiglu(program, act.gate_up, activation_name=a.activation, out=act.gated)
        if gated.ints is not None:
            to_int_row(program, act.gated, gated.ints)
    if layer + 1 < a.n_layers:
        following = model.layers[layer + 1]
        after = act.row_before(recording, "x", act.x, following.qkv, following.attn_norm)
    else:
        after = act.row_before(recording, "x", act.x, model.head, model.output_norm)
    block_end(gated, weights.down, "down", weights.post_ffn_norm, act.middle, after)
