"""Gradients of one group's factors and d_z of the next in one dispatch: to the bits of two."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from lora.backward.lora import GroupGradients, lora_project_gradient
from lora.backward.lora_pending import STORAGE_BUFFERS, PendingGradients, gradients_wait
from lora.checks.references.lora import gradients_reference
from lora.forward.matmul_paired import row_scales
from lora.forward.part_product import SizedRows
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.attention_cuts import on_matrix_units
from tests.support.half_tensors import needs_halves
from tests.support.kernels import with_facts
from tests.support.lora_cases import SCALE, UNTOUCHED, Case, Recorded, Values, record, values_of

# A group whose gradients wait, and the one that comes next.
PAIRS = [
    (Case(1, 1, 4, 4, ((0, 4),)), Case(1, 1, 8, 4, ((0, 12),))),
    (Case(7, 3, 36, 16, ((0, 100),), 4), Case(7, 3, 100, 16, ((0, 36), (36, 48)))),
    (  # the next group's middle matrix is not adapted
        Case(65, 40, 260, 12, ((0, 64), (64, 128)), 3),
        Case(65, 40, 36, 8, ((8, 40), (100, 164))),
    ),
    (Case(65, 0, 36, 8, ((0, 16),), 2), Case(65, 0, 36, 8, ((0, 16),))),
]
WIDE = (Case(130, 129, 68, 32, ((0, 1032),), 4), Case(130, 129, 36, 16, ((0, 576), (576, 964))))


@dataclass(frozen=True)
class Pair:
    """Both groups, recorded one after the other and run."""

    first: Recorded
    second: Recorded
    values: Values

    def group(self) -> GroupGradients:
        """The gradients of the first."""
        one = self.first
        return GroupGradients(
            one.x, one.z, one.d_y, one.d_z, one.lora, one.slices, one.dropout, one.scaled
        )

    def written(self) -> tuple[bytes, ...]:
        """What the two steps write."""
        read = self.first.program.recording.memory.read
        of_slices = [
            read(t).tobytes() for s in self.first.slices for t in (s.a, s.b, s.magnitude) if t
        ]
        return (*of_slices, read(self.second.d_z).tobytes())

    def forget(self) -> None:
        """As before the two steps."""
        memory = self.first.program.recording.memory
        memory.write(self.second.d_z, np.full(self.second.d_z.shape, UNTOUCHED))
        for one in self.first.slices:
            for tensor in filter(None, (one.a, one.b, one.magnitude)):
                memory.write(tensor, np.zeros(tensor.shape, np.float32))


def run_apart(recording: Recording, cases: tuple[Case, Case], dtype: str) -> Pair:
    values = [values_of(case) for case in cases]
    if dtype == "f16":
        values = [
            Values(*(v.astype(np.float16).astype(np.float32) for v in (w.x, w.d_y, w.a, w.b)))
            for w in values
        ]
    first = record(recording, cases[0], values[0], 0.0, dtype, dtype)
    second = record(recording, cases[1], values[1], 0.0, dtype, "f32", extent=first.x.extent)
    for one in (first, second):
        one.program.run()
    return Pair(first, second, values[0])


def run_together(recording: Recording, pair: Pair) -> Program:
    """The two steps in one dispatch."""
    program, pending = Program(recording), PendingGradients()
    pending.add(program, pair.group())
    assert not program.dispatches
    second = pair.second
    scales = None if second.scaled is None else second.scaled.scales
    pending.project(program, second.sized, second.lora, second.d_z, scales)
    pending.flush(program)
    (dispatch,) = program.dispatches
    assert dispatch.template.startswith("lora_backward")
    uniforms = 2 if pair.first.dropout else 1
    more = 0 if second.scaled is None else 4
    more += sum(one.sized.largest is not None for one in (pair.first, second))
    assert len(dispatch.tensors) - uniforms <= STORAGE_BUFFERS + more
    program.run()
    return program


def _name(cases: tuple[Case, Case]) -> str:
    return f"{cases[0].rows} rows, {cases[0].in_use} in use"


@pytest.mark.parametrize("cases", [*PAIRS, WIDE], ids=_name)
def test_as_two_dispatches(recording: Recording, cases: tuple[Case, Case]) -> None:
    recording = with_facts(recording, is_cpu=False)
    pair = run_apart(recording, cases, "f32")
    expected = pair.written()
    pair.forget()
    assert pair.written() != expected or cases[0].in_use == 0
    run_together(recording, pair)
    assert pair.written() == expected


@pytest.mark.parametrize("cases", [*PAIRS[1:], WIDE], ids=_name)
def test_as_two_dispatches_on_matrix_units(recording: Recording, cases: tuple[Case, Case]) -> None:
    recording = with_facts(on_matrix_units(recording), is_cpu=False)
    pair = run_apart(recording, cases, "f16")
    expected = pair.written()
    pair.forget()
    (dispatch,) = run_together(recording, pair).dispatches
    assert dispatch.template == "lora_backward_matrix" and pair.written() == expected


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True)])
def test_of_a_copy_in_f16(recording: Recording, first: bool, second: bool) -> None:
    """The stream's gradient is what waits, or what comes next."""
    recording = with_facts(on_matrix_units(recording), is_cpu=False)
    cases = PAIRS[1]
    pair = run_apart(
        recording, (replace(cases[0], copied=first), replace(cases[1], copied=second)), "f32"
    )
    expected = pair.written()
    pair.forget()
    (dispatch,) = run_together(recording, pair).dispatches
    assert dispatch.template == "lora_backward_matrix" and pair.written() == expected
    assert dispatch.constants["d_y_copied"] == first
    of_z = dispatch.constants["projection"]
    assert (of_z["x_type"], of_z["x_scaled"]) == (("f16", True) if second else ("f32", False))


@pytest.mark.parametrize("cases", PAIRS[1:], ids=_name)
def test_columns_that_are_scaled(recording: Recording, cases: tuple[Case, Case]) -> None:
    recording = with_facts(on_matrix_units(recording), is_cpu=False, most_storage_buffers=16)
    pair = run_apart(recording, (replace(cases[0], dora=True), replace(cases[1], dora=True)), "f16")
    expected = pair.written()
    pair.forget()
    (dispatch,) = run_together(recording, pair).dispatches
    assert dispatch.template == "lora_backward_matrix" and pair.written() == expected


def test_with_rows_of_f32_that_are_sized(recording: Recording) -> None:
    """As in f16 the stream's gradient is, some rows of which f16 could not hold."""
    recording = with_facts(on_matrix_units(recording), is_cpu=False)
    cases = PAIRS[1]
    first = record(recording, cases[0], values_of(cases[0]), 0.0, "f16", "f16")
    values = values_of(cases[1])
    values.d_y[::3] *= 1e7
    second = record(recording, cases[1], values, 0.0, "f16", "f32", extent=first.x.extent)
    first.program.run()
    sizing = Program(recording)
    rows = second.sized.rows
    sized = SizedRows(rows, row_scales(sizing, rows, 6, "second"))
    assert sized.largest is not None
    lora_project_gradient(sizing, sized, second.lora, out=second.d_z)
    sizing.run()
    pair = Pair(first, second, values)
    expected = pair.written()
    assert np.isfinite(recording.memory.read(second.d_z)[: cases[1].in_use]).all()
    pair.forget()
    program, pending = Program(recording), PendingGradients()
    pending.add(program, pair.group())
    pending.project(program, sized, second.lora, second.d_z)
    pending.flush(program)
    (dispatch,) = program.dispatches
    assert dispatch.template == "lora_backward_matrix"
    program.run()
    assert pair.written() == expected
    few = with_facts(recording, most_storage_buffers=len(dispatch.tensors) - 2)
    apart = Program(few)
    pending.add(apart, pair.group())
    pending.project(apart, sized, second.lora, second.d_z)
    assert len(apart.dispatches) == 2


def test_on_any_driver(recording: Recording) -> None:
    """Also by software that has units."""
    recording = with_facts(on_matrix_units(recording, on_software=True), is_cpu=False)
    cases = Case(20, 19, 40, 8, ((0, 24),), 2), Case(20, 19, 16, 8, ((0, 40),))
    for copied in (False, True):
        first, second = (replace(case, copied=copied) for case in cases)
        pair = run_apart(recording, (first, second), "f16")
        expected = pair.written()
        pair.forget()
        (dispatch,) = run_together(recording, pair).dispatches
        assert dispatch.template == "lora_backward_matrix" and pair.written() == expected


@pytest.mark.usefixtures("short")  # as in runs: test_as_two_dispatches
def test_halves(recording: Recording) -> None:
    needs_halves(recording.facts)
    recording = with_facts(recording, is_cpu=False)
    pair = run_apart(recording, PAIRS[2], "f16")
    expected = pair.written()
    pair.forget()
    run_together(recording, pair)
    assert pair.written() == expected


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("on_units", [False, True])
def test_dropout(recording: Recording, on_units: bool) -> None:
    recording = on_matrix_units(recording) if on_units else recording
    recording = with_facts(recording, is_cpu=False)
    dtype = "f16" if on_units else "f32"
    without = run_apart(recording, PAIRS[2], dtype).written()
    pair = run_apart(recording, (replace(PAIRS[2][0], dropout=0.3), PAIRS[2][1]), dtype)
    expected = pair.written()
    pair.forget()
    (dispatch,) = run_together(recording, pair).dispatches
    assert dispatch.template == ("lora_backward_matrix" if on_units else "lora_backward")
    assert pair.written() == expected != without


def test_against_float64(recording: Recording) -> None:
    """Sums of f32: see test_lora.py for the bound."""
    recording, (case, following) = with_facts(recording, is_cpu=False), WIDE
    pair = run_apart(recording, WIDE, "f32")
    pair.forget()
    run_together(recording, pair)
    read, used = recording.memory.read, slice(0, case.in_use)
    v, w = pair.values, values_of(following)
    _, d_a, d_b = gradients_reference(v.x[used], v.d_y[used], v.a, v.b, case.ranges, SCALE)
    d_z, _, _ = gradients_reference(w.x[used], w.d_y[used], w.a, w.b, following.ranges, SCALE)
    slices = pair.first.slices
    for found, expected in (
        (sum(read(s.a).astype(np.float64) for s in slices), d_a),
        (sum(read(s.b).astype(np.float64) for s in slices), d_b),
        (read(pair.second.d_z)[used], d_z),
    ):
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert (read(pair.second.d_z)[case.in_use :] == UNTOUCHED).all()


def test_what_waits_and_what_does_not(recording: Recording) -> None:
    gpu = with_facts(recording, is_cpu=False, most_storage_buffers=STORAGE_BUFFERS)
    assert gradients_wait(gpu)
    assert not gradients_wait(with_facts(gpu, most_storage_buffers=STORAGE_BUFFERS - 1))
    assert not gradients_wait(with_facts(gpu, is_cpu=True))

    def templates(of: Recording, extent_shared: bool = True) -> list[str]:
        first = record(of, PAIRS[1][0], values_of(PAIRS[1][0]), 0.0)
        extent = first.x.extent if extent_shared else None
        second = record(of, PAIRS[1][1], values_of(PAIRS[1][1]), 0.0, extent=extent)
        program, pending = Program(of), PendingGradients()
        group = GroupGradients(first.x, first.z, first.d_y, first.d_z, first.lora, first.slices)
        pending.add(program, group)
        both = (first.d_z, second.d_z)
        assert pending.free(both) is both[program.dispatches == []]
        pending.project(program, second.sized, second.lora, second.d_z)
        pending.flush(program)
        return [dispatch.template for dispatch in program.dispatches]

    assert templates(gpu) == ["lora_backward"]
    apart = ["lora_gradient", "lora_project"]
    assert templates(with_facts(gpu, is_cpu=True)) == apart
    assert templates(with_facts(gpu, most_storage_buffers=8)) == apart
    assert templates(gpu, extent_shared=False) == apart  # other rows, as a head's
    # Too little for eight lanes to share a block's rows: its sums would be other ones.
    assert templates(with_facts(gpu, workgroup_memory=8192)) == apart
