"""The gradient of the gated activation against float64 numpy."""

import numpy as np
import pytest

from lora.backward.swiglu import SwigluBefore, swiglu_backward
from lora.checks.references.swiglu import gate_reference, swiglu_backward_reference
from lora.forward.model.powers import LayerPowers
from lora.forward.swiglu import swiglu
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
)
from tests.support.stretches import STRETCHES, finish, in_stretches, same
from tests.support.swiglu_cases import ACTIVATIONS, SHAPES, make_inputs


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_reference_is_the_derivative(name: str) -> None:
    rng = np.random.default_rng(0)
    gate_up, direction = 2 * rng.normal(size=(3, 40)), rng.normal(size=(3, 40))
    d_y = rng.normal(size=(3, 20))
    slope = central_difference(
        lambda v: float((gate_reference(v[:, :20], name) * v[:, 20:] * d_y).sum()),
        gate_up,
        direction,
    )
    expected = (swiglu_backward_reference(gate_up, d_y, name) * direction).sum()
    assert slope == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_stored_as_other_multiples(recording: Recording, name: str, dtype: str) -> None:
    """A gate 2^-14 of itself, y 2^-9 of itself: as f32 has them, and their gradients as well."""
    if dtype == "f16":
        needs_halves(recording.facts)
    rows, in_use, width = 35, 33, 36
    gate_up, d_y = make_inputs(rows, width)
    powers = LayerPowers(gate=2.0**14, gated=2.0**-9)
    stored = np.concatenate([2.0**-14 * gate_up[:, :width], gate_up[:, width:]], axis=1)
    stored = rounded(stored.astype(np.float32), dtype)
    extent = extent_in_use(recording, rows, in_use)
    source, d_source = (typed(recording, v, dtype, extent) for v in (stored, d_y))
    y, d_gate_up, again = (
        typed_marked(recording, "f32", extent, n) for n in (width, 2 * width, width)
    )
    program = Program(recording)
    swiglu(program, source, activation_name=name, out=y, powers=powers)
    swiglu_backward(
        program, source, d_source, activation_name=name, out=d_gate_up, gated=again, powers=powers
    )
    program.run()
    true = stored.astype(np.float64)
    true[:, :width] *= 2.0**14
    expected = 2.0**-9 * gate_reference(true[:, :width], name) * true[:, width:]
    d_expected = 2.0**-9 * swiglu_backward_reference(true, rounded(d_y, dtype), name)
    d_expected[:, :width] *= 2.0**14
    used = slice(0, in_use)
    found, d_found = (recording.memory.read(tensor)[used] for tensor in (y, d_gate_up))
    # As in the tests of these kernels without powers, which move no bit.
    np.testing.assert_allclose(found, expected[used], rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(d_found, d_expected[used], rtol=2e-5, atol=2e-4)
    assert (recording.memory.read(again)[used] == found).all()


@pytest.mark.parametrize(("quads", "in_place"), [(1, False), (1, True), (4, False), (4, True)])
@pytest.mark.parametrize(("rows", "in_use", "width", "name"), SHAPES)
def test_swiglu_backward(
    recording: Recording, monkeypatch: pytest.MonkeyPatch, rows: int, in_use: int, width: int,
    name: str,
    in_place: bool, quads: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("lora.forward.swiglu.CPU_QUADS", quads)
    monkeypatch.setattr("lora.forward.swiglu.GPU_QUADS", quads)
    gate_up, d_y = make_inputs(rows, width)
    extent = extent_in_use(recording, rows, in_use)
    source = activation(recording, gate_up, extent)
    out = source if in_place else marked(recording, extent, 2 * width)
    program = Program(recording)
    swiglu_backward(
        program, source, activation(recording, d_y, extent), activation_name=name, out=out
    )
    result = run_twice(program, out)
    expected = swiglu_backward_reference(gate_up, d_y, name)
    # exp of WGSL is good to 3 + 2|x| ulp (40 at |gate| 18); the slope is a sum of two terms of
    # which the larger is about |gate|, times d_y · up of up to 30: 30 · 10 · 2^-24 absolute.
    np.testing.assert_allclose(result[:in_use], expected[:in_use], rtol=4e-6, atol=2e-5)
    untouched = gate_up if in_place else np.full_like(gate_up, MARKER)
    assert (result[in_use:] == untouched[in_use:]).all()


@pytest.mark.parametrize(
    ("name", "in_place", "d_y_type"),
    [("silu", False, "f16"), ("silu", True, "f32"), ("gelu_tanh", True, "f16")],
)
def test_swiglu_backward_of_halves(
    recording: Recording, name: str, in_place: bool, d_y_type: str
) -> None:
    needs_halves(recording.facts)
    gate_up, d_y = make_inputs(67, 100)
    gate_up, d_y = rounded(gate_up, "f16"), rounded(d_y, d_y_type)
    extent = extent_in_use(recording, 67, 66)
    source = typed(recording, gate_up, "f16", extent)
    out = source if in_place else typed_marked(recording, "f16", extent, 200)
    program = Program(recording)
    d_y_tensor = typed(recording, d_y, d_y_type, extent)
    swiglu_backward(program, source, d_y_tensor, activation_name=name, out=out)
    result = run_twice(program, out)
    expected = swiglu_backward_reference(gate_up, d_y, name)
    # As in test_swiglu_backward, and the rounding of the result.
    assert_rounded_once(result[:66], expected[:66], rtol=4e-6, atol=2e-5)
    assert (result[66:] == (gate_up[66:] if in_place else MARKER)).all()


@pytest.mark.parametrize("quads", [1, 4])
@pytest.mark.parametrize(("splits", "dtype"), STRETCHES)
def test_a_gradient_in_stretches(
    recording: Recording, monkeypatch: pytest.MonkeyPatch, splits: int, dtype: str, quads: int
) -> None:
    """To the bits of the gradient that is finished first."""
    if dtype == "f16":
        needs_halves(recording.facts)
    monkeypatch.setattr("lora.forward.swiglu.CPU_QUADS", quads)
    monkeypatch.setattr("lora.forward.swiglu.GPU_QUADS", quads)
    stretches, extent = in_stretches(recording, splits, 19, 36), extent_in_use(recording, 19, 17)
    gate_up = rounded(make_inputs(19, 36)[0], dtype)
    d_y, unread = (typed(recording, np.full((19, 36), np.nan), dtype, extent) for _ in range(2))
    apart, at_once = (typed(recording, gate_up, dtype, extent) for _ in range(2))
    again = typed_marked(recording, dtype, extent, 36)
    program = Program(recording)
    finish(program, stretches, d_y)
    swiglu_backward(program, apart, d_y, out=apart)
    SwigluBefore(at_once, again=again).record(program, unread, stretches)
    program.run()
    found, expected, gated = (recording.memory.read(t) for t in (at_once, apart, again))
    assert same(recording, [dtype], [found], [expected]) and (found[17:] == gate_up[17:]).all()
    assert (gated[:17] != MARKER).all() and (gated[17:] == MARKER).all()


@pytest.mark.parametrize("columns", [12, 9])
def test_a_width_of_no_whole_vectors_is_refused(recording: Recording, columns: int) -> None:
    extent = recording.memory.extent(2)
    gate_up = recording.memory.empty((2, columns), extent=extent)
    d_y = recording.memory.empty((2, columns // 2), extent=extent)
    with pytest.raises(ValueError, match="no multiple of 4"):
        swiglu_backward(Program(recording), gate_up, d_y)


def test_another_range_of_the_same_buffer_is_refused(recording: Recording) -> None:
    """Read as "in place" the gradient would be taken at the output's old numbers."""
    extent = recording.memory.extent(1)
    both, d_y = recording.memory.empty((2, 64)), recording.memory.empty((1, 32), extent=extent)
    gate_up = activation(recording, np.ones((1, 64), np.float32), extent)
    with pytest.raises(ValueError, match="another range of gate_up's buffer"):
        swiglu_backward(
            Program(recording),
            type(gate_up)(both.buffer, 0, (1, 64), extent=extent),
            d_y,
            out=both.slice(1, 2),
        )
