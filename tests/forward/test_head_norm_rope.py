"""The norm of query and key heads and their rotation against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest

from lora.checks.references.head_norm_rope import head_norm_rope_reference
from lora.forward.head_norm_rope import head_norm_rope
from lora.forward.heads import Heads, Rotation
from lora.forward.model.norm import HeadNorms, Norm
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.half_tensors import (
    assert_rounded_once,
    needs_halves,
    rounded,
    typed,
    typed_marked,
)
from tests.support.kernels import MARKER, extent_in_use, run_twice, with_facts
from tests.support.rope_cases import CASES_AND_LANES, EPSILON, HALF_CASES, Case


def check(recording: Recording, case: Case, x_type: str, out_type: str) -> None:
    rng = np.random.default_rng(case.rows)
    qkv = rounded(rng.normal(size=(case.rows, case.width)), x_type)
    q_weight, k_weight = rng.normal(size=(2, case.head_size)).astype(np.float32)
    extent = extent_in_use(recording, case.rows, case.in_use)
    positions, positions_tensor, tables = case.tensors(recording, extent)
    out = typed_marked(recording, out_type, extent, case.width)
    program = Program(recording)
    upload = recording.memory.upload
    head_norm_rope(
        program,
        typed(recording, qkv, x_type, extent),
        HeadNorms(Norm(upload(q_weight), EPSILON), Norm(upload(k_weight), EPSILON)),
        Rotation(positions_tensor, tables, case.interleaved),
        case.heads,
        out=out,
    )
    assert len(program.commands) == case.dispatches
    result, used = run_twice(program, out), slice(0, case.in_use)
    expected = head_norm_rope_reference(qkv, q_weight, k_weight, positions, case.layout)
    v = (case.n_heads + case.n_kv_heads) * case.head_size
    # As in test_rmsnorm.py, a sum of squares in a tree, a root, two products; then as in
    # test_rope.py tables rounded to f32, two products and a sum, of numbers up to 8. A rope of its
    # own turns what has been rounded to f16: by half a unit of up to 8, twice.
    between = 2 * 2**-11 * 8 if out_type == "f16" and case.dispatches == 2 else 0
    assert_rounded_once(result[used, :v], expected[used, :v], rtol=2e-6, atol=4e-6 + between)
    assert (result[used, v:] == rounded(qkv[used, v:], out_type)).all()
    assert (result[case.in_use :] == MARKER).all()


@pytest.mark.parametrize(("case", "is_cpu"), CASES_AND_LANES, ids=str)
def test_head_norm_rope(recording: Recording, case: Case, is_cpu: bool) -> None:
    recording = with_facts(recording, is_cpu=is_cpu)  # both run on any device
    check(recording, case, "f32", "f32")


@pytest.mark.parametrize(("case", "x_type", "out_type"), HALF_CASES, ids=str)
def test_head_norm_rope_of_halves(
    recording: Recording, case: Case, x_type: str, out_type: str
) -> None:
    needs_halves(recording.facts)
    check(recording, case, x_type, out_type)


def test_weights_of_another_size_are_refused(recording: Recording) -> None:
    extent = recording.memory.extent(2)
    qkv = recording.memory.empty((2, 24), extent=extent)
    weight, short = recording.memory.empty((8,)), recording.memory.empty((4,))
    positions, tables = (
        recording.memory.empty((2,), "u32", extent=extent),
        recording.memory.empty((4, 4, 2)),
    )
    with pytest.raises(ValueError, match="head_norm_rope k_weight has shape"):
        head_norm_rope(
            Program(recording), qkv, HeadNorms(Norm(weight, EPSILON), Norm(short, EPSILON)),
            Rotation(positions, tables, interleaved=False), Heads(1, 1, 8, scale=1.0),
        )  # fmt: skip


def test_more_rotated_columns_than_a_head_has_are_refused(recording: Recording) -> None:
    extent = recording.memory.extent(2)
    qkv, weight = recording.memory.empty((2, 24), extent=extent), recording.memory.empty((8,))
    positions, tables = (
        recording.memory.empty((2,), "u32", extent=extent),
        recording.memory.empty((4, 8, 2)),
    )
    with pytest.raises(ValueError, match="16 rotated columns do not fit heads of 8"):
        head_norm_rope(
            Program(recording), qkv, HeadNorms(Norm(weight, EPSILON), Norm(weight, EPSILON)),
            Rotation(positions, tables, interleaved=False), Heads(1, 1, 8, scale=1.0),
        )  # fmt: skip
