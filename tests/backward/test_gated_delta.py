"""The gradient of the gated delta rule; see lora/checks/kernels/recurrent.py."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from lora.checks.comparison import NotHereError
from lora.checks.kernels.recurrent import (
    SIZES,
    check_delta_gates,
    check_gated_delta_backward,
    random_inputs,
)
from lora.checks.references.gated_delta import (
    DeltaInputs,
    delta_gates_backward_reference,
    delta_gates_reference,
    gated_delta_backward_reference,
    gated_delta_reference,
)
from lora.forward.gated_delta import DeltaSizes
from lora.shaders.recording import Recording
from tests.support.kernels import central_difference, with_facts

SHAPES = [SIZES, DeltaSizes(4, 4, 20), DeltaSizes(4, 12, 8)]
KINDS = {
    "cpu": {"is_cpu": True},
    "gpu": {"is_cpu": False},
    "small gpu": {"is_cpu": False, "workgroup_memory": 16384},
}
# Chunks of a small GPU are another number in the same kernels.
CASES = [(k, s) for k in KINDS for s in (SHAPES if k != "small gpu" else SHAPES[:1])]


@pytest.mark.parametrize(("kind", "sizes"), CASES, ids=str)
def test_gated_delta_backward(recording: Recording, kind: str, sizes: DeltaSizes) -> None:
    result = check_gated_delta_backward(with_facts(recording, **KINDS[kind]), sizes)
    assert result.passed, result


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_delta_gates_backward(recording: Recording, dtype: str) -> None:
    try:
        result = check_delta_gates(recording, dtype, backward=True)
    except NotHereError as why:
        pytest.skip(str(why))
    assert result.passed, result


def test_the_reference_is_a_gradient() -> None:
    x = random_inputs(SIZES, (0, 3, 12))
    rng = np.random.default_rng(1)
    d_o = rng.normal(size=x.v.shape)
    gradients = gated_delta_backward_reference(x, d_o)
    for name in (field.name for field in fields(DeltaInputs) if field.name != "starts"):
        values = getattr(x, name).astype(np.float64)
        direction = rng.normal(size=values.shape)
        gradient = getattr(gradients, name)
        if name in "qk":  # value heads 0 and 2 share key head 0, 1 and 3 key head 1
            gradient = gradient.reshape(len(values), 2, *values.shape[1:]).sum(1)

        def loss(values: np.ndarray, name: str = name) -> float:
            return float((d_o * gated_delta_reference(replace(x, **{name: values}))[0]).sum())

        assert (gradient * direction).sum() == pytest.approx(
            central_difference(loss, values, direction), rel=1e-6
        )


def test_the_gates_reference_is_a_gradient() -> None:
    rng = np.random.default_rng(0)
    both, direction, d_gates = rng.normal(size=(3, 5, 8))
    a, dt = -np.exp(rng.normal(size=4)), rng.normal(size=4)

    def loss(both: np.ndarray) -> float:
        g, beta = delta_gates_reference(both[:, :4], both[:, 4:], a, dt)
        return float((d_gates * np.concatenate([g, beta], axis=1)).sum())

    gradient = delta_gates_backward_reference(both[:, :4], both[:, 4:], a, dt, d_gates)
    assert (gradient * direction).sum() == pytest.approx(
        central_difference(loss, both, direction), rel=1e-7
    )
