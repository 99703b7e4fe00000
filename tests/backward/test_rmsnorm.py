"""The gradient of RMSNorm against float64 numpy."""

import numpy as np
import pytest

from lora.backward.rmsnorm import rmsnorm_backward
from lora.checks.references.rmsnorm import rmsnorm_backward_reference, rmsnorm_reference
from lora.forward.model.norm import Norm
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.half_tensors import (
    assert_rounded_once,
    needs_halves,
    rounded,
    typed,
    typed_marked,
)
from tests.support.kernels import (
    MARKER,
    activation,
    central_difference,
    extent_in_use,
    marked,
    run_twice,
    with_facts,
)

EPSILON = 1e-5


def test_reference_is_the_derivative() -> None:
    rng = np.random.default_rng(0)
    x, d_y, direction = (rng.normal(size=(3, 20)) for _ in range(3))
    weight = rng.normal(size=20)
    slope = central_difference(
        lambda v: float((rmsnorm_reference(v, weight, EPSILON) * d_y).sum()), x, direction
    )
    expected = (rmsnorm_backward_reference(x, weight, d_y, EPSILON) * direction).sum()
    assert slope == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("is_cpu", [True, False], ids=["CPU's lanes", "GPU's lanes"])
@pytest.mark.parametrize(
    ("rows", "in_use", "width", "residual"),
    [
        (1, 1, 4, "none"),
        (3, 2, 36, "separate"),
        (67, 66, 100, "in place"),
        (130, 129, 576, "separate"),
        (3, 2, 2052, "none"),
        (2, 2, 16384, "in place"),
    ],
)
def test_rmsnorm_backward(
    recording: Recording, rows: int, in_use: int, width: int,
    residual: str, is_cpu: bool,
) -> None:  # fmt: skip
    recording = with_facts(recording, is_cpu=is_cpu)  # both run on any device
    rng = np.random.default_rng(width)
    x, d_y, past = (rng.normal(size=(rows, width)).astype(np.float32) for _ in range(3))
    weight = rng.normal(size=width).astype(np.float32)
    extent = extent_in_use(recording, rows, in_use)
    x_t, d_t, past_t = (activation(recording, values, extent) for values in (x, d_y, past))
    out = past_t if residual == "in place" else marked(recording, extent, width)
    program = Program(recording)
    rmsnorm_backward(
        program, x_t, Norm(recording.memory.upload(weight), EPSILON), d_t,
        residual=None if residual == "none" else past_t, out=out,
    )  # fmt: skip
    result = run_twice(program, out)
    expected = rmsnorm_backward_reference(x, weight, d_y, EPSILON)
    if residual != "none":
        expected += past
    # Two sums of `width` terms in f32, then a difference of numbers of about |d_y| rstd.
    np.testing.assert_allclose(result[:in_use], expected[:in_use], rtol=1e-5, atol=3e-6)
    untouched = past if residual == "in place" else np.full_like(past, MARKER)
    assert (result[in_use:] == untouched[in_use:]).all()


def test_another_range_of_the_same_buffer_is_no_residual_in_place(recording: Recording) -> None:
    """Read as "in place" the residual would be dropped and the output's old numbers added."""
    both = recording.memory.empty((2, 64))
    extent = recording.memory.extent(1)
    x, d_y = (activation(recording, np.ones((1, 64), np.float32), extent) for _ in range(2))
    with pytest.raises(ValueError, match="another range of the output's buffer"):
        rmsnorm_backward(
            Program(recording), x, Norm(recording.memory.upload(np.ones(64)), EPSILON), d_y,
            residual=both.slice(0, 1), out=both.slice(1, 2),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("x_type", "d_y_type", "out_type", "in_place"),
    [
        ("f32", "f16", "f32", True),
        ("f16", "f32", "f16", True),
        ("f16", "f16", "f32", False),
        ("f16", "f16", "f16", False),
    ],
)
def test_rmsnorm_backward_of_halves(
    recording: Recording, x_type: str, d_y_type: str, out_type: str, in_place: bool
) -> None:
    needs_halves(recording.facts)
    rng = np.random.default_rng(4)
    x, d_y, past = rng.normal(size=(3, 67, 100)).astype(np.float32)
    x, d_y, past = rounded(x, x_type), rounded(d_y, d_y_type), rounded(past, out_type)
    weight = rng.normal(size=100).astype(np.float32)
    extent = extent_in_use(recording, 67, 66)
    out = typed_marked(recording, out_type, extent, 100)
    if in_place:
        recording.memory.write(out, past)
    program = Program(recording)
    rmsnorm_backward(
        program, typed(recording, x, x_type, extent),
        Norm(recording.memory.upload(weight), EPSILON),
        typed(recording, d_y, d_y_type, extent), residual=out if in_place else None, out=out,
    )  # fmt: skip
    result = run_twice(program, out)
    expected = rmsnorm_backward_reference(x, weight, d_y, EPSILON) + in_place * past
    # As in test_rmsnorm_backward, and the rounding of the result.
    assert_rounded_once(result[:66], expected[:66], rtol=1e-5, atol=3e-6)
    assert (result[66:] == (past[66:] if in_place else MARKER)).all()
