"""The gradient of the output gate of attention; see lora/checks/kernels/recurrent.py."""

from __future__ import annotations

import numpy as np
import pytest

from lora.checks.comparison import NotHereError
from lora.checks.kernels.recurrent import check_head_gate
from lora.checks.references.head_gate import head_gate_backward_reference, head_gate_reference
from lora.shaders.recording import Recording
from tests.support.kernels import central_difference


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_head_gate_backward(recording: Recording, dtype: str) -> None:
    try:
        result = check_head_gate(recording, dtype, backward=True)
    except NotHereError as why:
        pytest.skip(str(why))
    assert result.passed, result


def test_the_reference_is_a_gradient() -> None:
    rng = np.random.default_rng(0)
    raw, d_raw = rng.normal(size=(2, 3, 28))
    x, d_x, d_y = rng.normal(size=(3, 3, 12))
    of_x, of_raw = head_gate_backward_reference(raw, x, 4, d_y)
    for gradient, values, direction, f in (
        (of_x, x, d_x, lambda x: head_gate_reference(raw, x, 4)),
        (of_raw, raw, d_raw, lambda raw: head_gate_reference(raw, x, 4)),
    ):
        slope = central_difference(lambda v, f=f: float((d_y * f(v)).sum()), values, direction)
        assert (gradient * direction).sum() == pytest.approx(slope, rel=1e-7)
