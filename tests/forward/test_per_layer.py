"""What tokens have for every layer, and copied columns, against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest

from lora.checks.comparison import NotHereError
from lora.checks.kernels.spans import (
    check_copy_columns,
    check_per_layer_gate,
    check_per_layer_inputs,
)
from lora.checks.references.per_layer import (
    per_layer_gate_backward_reference,
    per_layer_gate_reference,
)
from lora.forward.copy_columns import copy_columns
from lora.forward.model.norm import Norm
from lora.forward.per_layer import per_layer_gate, per_layer_inputs
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import central_difference


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_kernels(recording: Recording, dtype: str) -> None:
    try:
        for result in (
            check_copy_columns(recording, accumulate=True, dtype=dtype),
            check_copy_columns(recording, accumulate=False, dtype=dtype),
            check_per_layer_inputs(recording, dtype),
            check_per_layer_gate(recording, backward=False, dtype=dtype),
            check_per_layer_gate(recording, backward=True, dtype=dtype),
            check_per_layer_gate(recording, backward=True, dtype=dtype, name="silu"),
        ):
            assert result.passed, result
    except NotHereError as why:
        pytest.skip(str(why))


def test_the_reference_is_a_gradient() -> None:
    rng = np.random.default_rng(0)
    gate, d_y, direction = rng.normal(size=(3, 2, 8))
    inputs = rng.normal(size=(2, 24))

    def loss(gate: np.ndarray) -> float:
        return float((d_y * per_layer_gate_reference(gate, inputs, 8, "gelu_tanh")).sum())

    gradient = per_layer_gate_backward_reference(gate, inputs, 8, "gelu_tanh", d_y)
    assert (gradient * direction).sum() == pytest.approx(
        central_difference(loss, gate, direction), rel=1e-7
    )


def test_what_does_not_fit_is_refused(recording: Recording) -> None:
    extent, program = recording.memory.extent(2), Program(recording)
    narrow, wide = (recording.memory.empty((2, n), extent=extent) for n in (8, 24))
    with pytest.raises(ValueError, match="columns from 20 on, of 24"):
        per_layer_gate(program, narrow, wide, 20, "silu", narrow)
    with pytest.raises(ValueError, match="do not fit"):
        copy_columns(program, wide, 20, narrow, 0, 8)
    with pytest.raises(ValueError, match="are not all multiples of 4"):
        copy_columns(program, wide, 2, narrow, 0, 8)
    norm = Norm(recording.memory.empty((16,)), 1e-6)
    with pytest.raises(ValueError, match="no layers of 16"):
        per_layer_inputs(program, wide, norm, wide, 1.0)
