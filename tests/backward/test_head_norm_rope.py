"""The gradient of the norm and rotation of query and key heads against float64 numpy."""

import numpy as np
import pytest

from lora.backward.head_norm_rope import head_norm_rope_backward
from lora.checks.references.head_norm_rope import (
    head_norm_rope_backward_reference,
    head_norm_rope_reference,
)
from lora.forward.heads import Rotation
from lora.forward.model.norm import HeadNorms, Norm
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.half_tensors import assert_rounded_once, needs_halves, rounded, typed
from tests.support.kernels import central_difference, extent_in_use, run_twice, with_facts
from tests.support.rope_cases import CASES_AND_LANES, EPSILON, HALF_CASES, Case


@pytest.mark.parametrize("interleaved", [True, False])
def test_reference_is_the_derivative(interleaved: bool) -> None:
    case = Case(3, 3, 2, 1, 12, 8, interleaved)
    rng = np.random.default_rng(0)
    qkv, d_y, direction = (rng.normal(size=(3, case.width)) for _ in range(3))
    q_weight, k_weight = rng.normal(size=(2, 12))
    positions = np.array([0, 7, 300])
    slope = central_difference(
        lambda v: float(
            (head_norm_rope_reference(v, q_weight, k_weight, positions, case.layout) * d_y).sum()
        ),
        qkv, direction,
    )  # fmt: skip
    gradient = head_norm_rope_backward_reference(
        qkv, q_weight, k_weight, d_y, positions, case.layout
    )
    assert slope == pytest.approx((gradient * direction).sum(), rel=1e-7)


def check(recording: Recording, case: Case, x_type: str, d_type: str) -> None:
    rng = np.random.default_rng(case.rows)
    qkv, d_y = rng.normal(size=(2, case.rows, case.width))
    qkv, d_y = rounded(qkv, x_type), rounded(d_y, d_type)
    q_weight, k_weight = rng.normal(size=(2, case.head_size)).astype(np.float32)
    extent = extent_in_use(recording, case.rows, case.in_use)
    positions, positions_tensor, tables = case.tensors(recording, extent)
    gradient = typed(recording, d_y, d_type, extent)
    program = Program(recording)
    upload = recording.memory.upload
    head_norm_rope_backward(
        program,
        typed(recording, qkv, x_type, extent),
        HeadNorms(Norm(upload(q_weight), EPSILON), Norm(upload(k_weight), EPSILON)),
        Rotation(positions_tensor, tables, case.interleaved),
        case.heads,
        gradient,
    )
    assert len(program.commands) == case.dispatches
    result, used = run_twice(program, gradient), slice(0, case.in_use)
    expected = head_norm_rope_backward_reference(
        qkv, q_weight, k_weight, d_y, positions, case.layout
    )
    # As in test_rmsnorm.py: two sums, then a difference of numbers of about |d_y| rstd, where a
    # head of four numbers can be small: rstd up to 10. A rope of its own leaves numbers of up to 4
    # rounded to f16, which the norm multiplies by weights and rstd of up to 3 each.
    between = 2**-11 * 4 * 9 if d_type == "f16" and case.dispatches == 2 else 0
    assert_rounded_once(result[used], expected[used], rtol=1e-5, atol=1e-5 + between)
    v = (case.n_heads + case.n_kv_heads) * case.head_size
    assert (result[:, v:] == d_y[:, v:]).all()
    assert (result[case.in_use :] == d_y[case.in_use :]).all()


@pytest.mark.parametrize(("case", "is_cpu"), CASES_AND_LANES, ids=str)
def test_head_norm_rope_backward(recording: Recording, case: Case, is_cpu: bool) -> None:
    recording = with_facts(recording, is_cpu=is_cpu)  # both run on any device
    check(recording, case, "f32", "f32")


@pytest.mark.parametrize(("case", "x_type", "d_type"), HALF_CASES, ids=str)
def test_head_norm_rope_backward_of_halves(
    recording: Recording, case: Case, x_type: str, d_type: str
) -> None:
    needs_halves(recording.facts)
    check(recording, case, x_type, d_type)
