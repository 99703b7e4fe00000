"""The gated activation against float64 numpy."""

import numpy as np
import pytest

from lora.checks.references.swiglu import gate_reference
from lora.forward.plans.stretches import Stretches
from lora.forward.swiglu import GateAfter, swiglu
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.half_tensors import (
    assert_rounded_once,
    needs_halves,
    rounded,
    typed,
    typed_marked,
)
from tests.support.kernels import MARKER, activation, extent_in_use, marked, run_twice
from tests.support.stretches import STRETCHES, finish, in_stretches, same
from tests.support.swiglu_cases import ACTIVATIONS, SHAPES, make_inputs


@pytest.mark.parametrize("quads", [1, 4])
@pytest.mark.parametrize(("rows", "in_use", "width", "name"), SHAPES)
def test_swiglu(
    recording: Recording, monkeypatch: pytest.MonkeyPatch, rows: int, in_use: int, width: int,
    name: str,
    quads: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("lora.forward.swiglu.CPU_QUADS", quads)
    monkeypatch.setattr("lora.forward.swiglu.GPU_QUADS", quads)
    gate_up, _ = make_inputs(rows, width)
    extent = extent_in_use(recording, rows, in_use)
    out = marked(recording, extent, width)
    program = Program(recording)
    swiglu(program, activation(recording, gate_up, extent), activation_name=name, out=out)
    result = run_twice(program, out)
    g, up = gate_up[:, :width].astype(np.float64), gate_up[:, width:]
    # exp and tanh of WGSL are good to some ulp; gelu cancels 1 + tanh at the left.
    np.testing.assert_allclose(
        result[:in_use], (gate_reference(g, name) * up)[:in_use], rtol=4e-6, atol=1e-5
    )
    assert (result[in_use:] == MARKER).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("x_type", "out_type"), [("f16", "f32"), ("f32", "f16"), ("f16", "f16")])
def test_swiglu_of_halves(recording: Recording, name: str, x_type: str, out_type: str) -> None:
    needs_halves(recording.facts)
    gate_up = rounded(make_inputs(67, 100)[0], x_type)
    extent = extent_in_use(recording, 67, 66)
    out = typed_marked(recording, out_type, extent, 100)
    program = Program(recording)
    swiglu(program, typed(recording, gate_up, x_type, extent), activation_name=name, out=out)
    result = run_twice(program, out)
    expected = gate_reference(gate_up[:, :100].astype(np.float64), name) * gate_up[:, 100:]
    # As in test_swiglu, and the rounding of the result.
    assert_rounded_once(result[:66], expected[:66], rtol=4e-6, atol=1e-5)
    assert (result[66:] == MARKER).all()


@pytest.mark.parametrize("quads", [1, 4])
@pytest.mark.parametrize(("splits", "dtype"), STRETCHES)
def test_a_product_in_stretches(
    recording: Recording, monkeypatch: pytest.MonkeyPatch, splits: int, dtype: str, quads: int
) -> None:
    """To the bits of the product that is finished first; that is written, too."""
    if dtype == "f16":
        needs_halves(recording.facts)
    monkeypatch.setattr("lora.forward.swiglu.CPU_QUADS", quads)
    monkeypatch.setattr("lora.forward.swiglu.GPU_QUADS", quads)
    stretches, extent = in_stretches(recording, splits, 19, 72), extent_in_use(recording, 19, 17)
    gate_up, written = (typed_marked(recording, dtype, extent, 72) for _ in range(2))
    apart, at_once = (typed_marked(recording, dtype, extent, 36) for _ in range(2))
    program = Program(recording)
    finish(program, stretches, gate_up)
    swiglu(program, gate_up, out=apart)
    GateAfter("silu", at_once).record(program, written, stretches)
    program.run()
    for one, other in ((at_once, apart), (written, gate_up)):
        found, expected = recording.memory.read(one), recording.memory.read(other)
        assert same(recording, [dtype], [found], [expected])
        assert (found[:17] != MARKER).all() and (found[17:] == MARKER).all()


def test_stretches_that_do_not_fit_are_refused(recording: Recording) -> None:
    extent = recording.memory.extent(2)
    gate_up, partial = (recording.memory.empty((n, 8), extent=extent) for n in (2, 3))
    with pytest.raises(ValueError, match="swiglu stretches has shape"):
        swiglu(Program(recording), gate_up, stretches=Stretches(partial, 2))
    whole = Stretches(recording.memory.empty((4, 8)), 2, residual=gate_up)
    with pytest.raises(ValueError, match="no residual of its own"):
        swiglu(Program(recording), gate_up, stretches=whole)


def test_an_unknown_activation_is_refused(recording: Recording) -> None:
    gate_up = recording.memory.empty((2, 8), extent=recording.memory.extent(2))
    with pytest.raises(ValueError, match="none of silu, gelu_tanh"):
        swiglu(Program(recording), gate_up, activation_name="relu")


@pytest.mark.parametrize("columns", [12, 7])
def test_a_width_of_no_whole_vectors_is_refused(recording: Recording, columns: int) -> None:
    gate_up = recording.memory.empty((2, columns), extent=recording.memory.extent(2))
    with pytest.raises(ValueError, match="no multiple of 4"):
        swiglu(Program(recording), gate_up)
