"""Gradient of the gated delta rule and of its gates (their weights are frozen)."""

from __future__ import annotations

from dataclasses import dataclass

from lora.forward.delta_matrix import delta_cut
from lora.forward.gated_delta import (
    DeltaSizes,
    DeltaTensors,
    GateWeights,
    gate_constants,
    states_shape,
)
from lora.shaders.activations import check_f32, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor

# Where parts of `DeltaGradients.d_deltas` begin, in value_sizes.
OUTPUT, QUERY, KEY, VALUE = 0, 2, 3, 5


@dataclass(frozen=True)
class DeltaGradients:
    """Gradients of the rule, f32.

    Attributes:
        d_deltas: [rows, 7 · value_size]: to what comes out first; at QUERY, KEY and VALUE
            value_sizes those to q, k and v are left, of every value head by itself.
        d_states: as `DeltaTensors.states`.
        d_gates: [rows, 2 · heads], to g and to beta.
    """

    d_deltas: Tensor
    d_states: Tensor
    d_gates: Tensor

    @classmethod
    def allocate(cls, recording: Recording, sizes: DeltaSizes, rows: Extent) -> DeltaGradients:
        """Tensors for up to rows.maximum rows."""

        def tensor(width: int) -> Tensor:
            return recording.memory.empty((rows.maximum, width), extent=rows)

        states = recording.memory.empty(states_shape(recording.facts, sizes, rows.maximum))
        return cls(tensor(7 * sizes.value_size), states, tensor(2 * sizes.value_heads))


def gated_delta_backward(
    program: Program, tensors: DeltaTensors, sizes: DeltaSizes, segments: Tensor,
    gradients: DeltaGradients,
) -> None:  # fmt: skip
    """Appends the gradient of `gated_delta`.

    Args:
        program: what the dispatches are appended to.
        tensors: of the forward; mixes is overwritten.
        sizes, segments: as in the forward.
        gradients: d_deltas holds the gradient to what comes out.
    """
    facts, extent = program.recording.facts, extent_of(tensors.inputs)
    rows = tensors.inputs.shape[0]
    tensors.check(facts, sizes)
    d_deltas, d_states, d_gates = gradients.d_deltas, gradients.d_states, gradients.d_gates
    check_f32("gated_delta_backward", d_deltas=d_deltas, d_states=d_states, d_gates=d_gates)
    check_shape("gated_delta_backward segments", segments, rows, 2)
    check_shape("gated_delta_backward d_deltas", d_deltas, rows, 7 * sizes.value_size)
    check_shape("gated_delta_backward d_states", d_states, *tensors.states.shape)
    check_shape("gated_delta_backward d_gates", d_gates, rows, 2 * sizes.value_heads)
    constants = sizes.constants(facts)
    chunk, n = constants["chunk"], sizes.head_size
    blocks = -(-extent.maximum // chunk) * sizes.value_heads
    products = extent.maximum * sizes.value_heads * n
    shared = [extent.uniform, tensors.inputs, tensors.mixes, tensors.deltas, segments, d_deltas]
    cut = delta_cut(program.recording, chunk, n)
    family = "delta" if cut is None else "delta_matrix"
    columns = sizes.columns() if cut is None else cut["columns"]
    constants |= cut or {}
    program.dispatch(
        f"{family}_walk_backward",
        constants | {"columns": columns},
        [*shared, d_states],
        blocks * (n // columns),
        flops=products * (6 * n + chunk),
    )
    if cut is None:
        program.dispatch(
            "delta_chunk_backward",
            constants,
            [*shared, tensors.states, d_states, d_gates],
            blocks,
            flops=products * (6 * n + 9 * chunk),
        )
        return
    program.dispatch(
        "delta_matrix_states_backward",
        constants,
        [
            extent.uniform, tensors.deltas, segments, d_deltas, tensors.states, d_states, d_gates,
        ],
        blocks,
        flops=products * 6 * n,
    )  # fmt: skip
    program.dispatch(
        "delta_matrix_chunk_backward",
        constants,
        [*shared, d_gates],
        blocks,
        flops=products * 9 * chunk,
    )


def delta_gates_backward(
    program: Program, projected: Tensor, first: int, weights: GateWeights, sizes: DeltaSizes,
    d_gates: Tensor, d_projected: Tensor,
) -> None:  # fmt: skip
    """Appends the gradient of `delta_gates` to b and alpha.

    Args:
        program, projected, first, weights, sizes: as in the forward.
        d_gates: of `DeltaGradients`.
        d_projected: shaped as projected, f32 or f16; other columns are left alone.
    """
    constants = gate_constants(projected, first, weights, sizes)
    check_f32("delta_gates_backward", d_gates=d_gates)
    rows = projected.shape[0]
    check_shape("delta_gates_backward d_gates", d_gates, rows, 2 * sizes.value_heads)
    check_shape("delta_gates_backward d_projected", d_projected, *projected.shape)
    extent = extent_of(projected)
    program.dispatch(
        "delta_gates_backward",
        constants | {"d_type": d_projected.dtype},
        [extent.uniform, projected, weights.a, weights.dt, d_gates, d_projected],
        -(-extent.maximum * sizes.value_heads // 256),
    )
