"""The norm of query and key heads and their rotation against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest

from lora.checks.references.head_norm_rope import head_norm_rope_reference
from lora.forward.head_norm_rope import HeadNormRopeAfter, head_norm_rope
from lora.forward.heads import Heads, Rotation
from lora.forward.model.norm import HeadNorms, Norm
from lora.forward.rmsnorm import MOST_PARTIAL_QUADS
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
from tests.support.rope_cases import CASES, CASES_AND_LANES, EPSILON, HALF_CASES, Case
from tests.support.stretches import finish, in_stretches, same


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


@pytest.mark.parametrize(
    ("case", "splits", "dtype"),
    [(CASES[1], 2, "f32"), (CASES[3], 7, "f32"), (CASES[4], 3, "f16"), (CASES[8], 2, "f16")],
    ids=str,
)
def test_a_product_in_stretches(recording: Recording, case: Case, splits: int, dtype: str) -> None:
    """To the bits of the product that is finished first, which is written, too."""
    if dtype == "f16":
        needs_halves(recording.facts)
    stretches = in_stretches(recording, splits, case.rows, case.width)
    weights = np.random.default_rng(1).normal(size=(2, case.head_size)).astype(np.float32)
    extent = extent_in_use(recording, case.rows, case.in_use)
    _, positions, tables = case.tensors(recording, extent)
    norms = HeadNorms(*(Norm(recording.memory.upload(weight), EPSILON) for weight in weights))
    rotation = Rotation(positions, tables, case.interleaved)
    given, written, apart, at_once = (
        typed_marked(recording, dtype, extent, case.width) for _ in range(4)
    )
    program = Program(recording)
    after = HeadNormRopeAfter(norms, rotation, case.heads, at_once)
    assert after.adds_up(recording, case.width, splits)
    assert not after.adds_up(recording, case.width, MOST_PARTIAL_QUADS + 1)
    finish(program, stretches, given)
    head_norm_rope(program, given, norms, rotation, case.heads, out=apart)
    after.record(program, written, stretches)
    program.run()
    for one, other in ((at_once, apart), (written, given)):
        found, expected = recording.memory.read(one), recording.memory.read(other)
        assert same(recording, [dtype], [found], [expected], roundings=2)
        assert (found[case.in_use :] == MARKER).all()
        assert (found[: case.in_use] != MARKER).all()


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
