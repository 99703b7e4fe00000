"""The low-rank projection and its gradients against float64 numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora.backward import lora as backward_lora
from lora.backward.lora import lora_gradients, lora_project_gradient
from lora.checks.references.lora import gradients_reference, low_rank_reference
from lora.forward.lora import GPU_TUNINGS, Tuning, lora_project
from lora.forward.model.factors import LoraFactors
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.half_tensors import needs_halves
from tests.support.kernels import with_facts
from tests.support.lora_cases import SCALE, UNTOUCHED, Case, Recorded, Values, record, values_of

CASES = [
    Case(1, 1, 4, 4, ((0, 4),)),
    Case(7, 7, 36, 8, ((0, 36), (36, 48), (48, 60)), 4),
    Case(7, 3, 36, 16, ((0, 100),), 4),
    Case(65, 64, 576, 8, ((0, 64), (64, 128)), 4),
    Case(130, 130, 100, 64, ((0, 36), (36, 48)), 1),
    Case(65, 40, 260, 16, ((8, 40), (100, 164)), 2),  # the group's middle matrix is not adapted
    Case(70, 70, 36, 256, ((0, 1028),), 2),
    Case(65, 0, 36, 8, ((0, 16),), 2),
    Case(37, 35, 2052, 8, ((0, 1032), (1032, 1044)), 4),  # long contractions, by more lanes
]
# Which blocks a case takes; each kind meets one row, long contractions, and rows not in use.
ON_CPU = [(CASES[i], True) for i in (0, 2, 4, 5, 8)]
ON_GPU = [(CASES[i], False) for i in (0, 1, 3, 5, 6, 7, 8)]
SMALL = Case(7, 7, 36, 8, ((0, 36), (36, 48), (48, 60)), 4)
LARGE = Case(130, 129, 580, 16, ((0, 576), (576, 768), (768, 964)), 3)


def assert_close(
    actual: np.ndarray, expected: np.ndarray, magnitude: np.ndarray, n_terms: int
) -> None:
    """Within the rounding of f32 sums.

    A sum of n products in f32 differs from the exact one by at most about n · 2^-24 times the sum
    of the products' sizes (`magnitude`), and by about its square root when roundings are random.
    """
    bound = 2.0**-24 * (4.0 + 4.0 * np.sqrt(n_terms)) * magnitude
    excess = np.abs(actual - expected) - bound
    assert (excess <= 1e-30).all(), f"{excess.max()} above a bound of {bound.flat[excess.argmax()]}"


@pytest.mark.parametrize(("case", "is_cpu"), ON_CPU + ON_GPU, ids=str)
def test_lora(recording: Recording, case: Case, is_cpu: bool) -> None:
    recording = with_facts(recording, is_cpu=is_cpu)  # both run on any device
    values = values_of(case)
    recorded = record(recording, case, values, start=0.0)
    recorded.program.run()
    check(recording, case, values, recorded)


@pytest.mark.parametrize(
    ("case", "x_type", "d_y_type", "is_cpu"),
    [
        (SMALL, "f16", "f32", False),
        (SMALL, "f32", "f16", False),
        (SMALL, "f16", "f16", True),
        (LARGE, "f32", "f16", True),
        (LARGE, "f16", "f16", False),
    ],
    ids=str,
)
def test_lora_of_halves(
    recording: Recording,
    case: Case,
    x_type: str,
    d_y_type: str,
    is_cpu: bool,
) -> None:
    needs_halves(recording.facts)
    recording = with_facts(recording, is_cpu=is_cpu)
    full = values_of(case)
    x, d_y = (
        v.astype(np.float16 if dtype == "f16" else np.float32).astype(np.float32)
        for v, dtype in ((full.x, x_type), (full.d_y, d_y_type))
    )
    values = Values(x, d_y, full.a, full.b)
    recorded = record(recording, case, values, 0.0, x_type, d_y_type)
    recorded.program.run()
    # Only what goes in is f16: products, sums and results are f32, and as close as there.
    check(recording, case, values, recorded)


def check(recording: Recording, case: Case, values: Values, recorded: Recorded) -> None:
    """Everything that a case's program has written, once, to zeroed gradients."""
    used = slice(0, case.in_use)
    x, d_y = values.x[used], values.d_y[used]
    x_size, d_y_size, a_size, b_size = (np.abs(v) for v in (x, d_y, values.a, values.b))

    z = recording.memory.read(recorded.z)
    z_expected = x.astype(np.float64) @ values.a.T
    assert_close(z[used], z_expected, x_size @ a_size.T, case.in_features)
    assert (z[case.in_use :] == UNTOUCHED).all()

    expected = gradients_reference(x, d_y, values.a, values.b, case.ranges, SCALE)
    magnitudes = gradients_reference(x_size, d_y_size, a_size, b_size, case.ranges, SCALE)
    d_z = recording.memory.read(recorded.d_z)
    longest = max(stop - start for start, stop in case.ranges)
    assert_close(d_z[used], expected[0], magnitudes[0], longest)
    assert (d_z[case.in_use :] == UNTOUCHED).all()

    d_a = np.stack([recording.memory.read(s.a) for s in recorded.slices]).sum(
        axis=0, dtype=np.float64
    )
    d_b = np.stack([recording.memory.read(s.b) for s in recorded.slices]).sum(
        axis=0, dtype=np.float64
    )
    # The rounding of d_z and z comes on top of that of the sum over rows.
    assert_close(d_a, expected[1], magnitudes[1], case.in_use + longest)
    assert_close(d_b, expected[2], magnitudes[2], case.in_use + case.in_features)


def test_stretches_of_rows_go_to_their_slices(recording: Recording) -> None:
    case = replace(CASES[2], rows=70, in_use=66)
    values = values_of(case)
    recorded = record(recording, case, values, start=0.0)
    recorded.program.run()
    for s, (first, last) in enumerate([(0, 17), (17, 34), (34, 51), (51, 66)]):
        x, d_y = values.x[first:last], values.d_y[first:last]
        _, d_a, d_b = gradients_reference(x, d_y, values.a, values.b, case.ranges, SCALE)
        # Sums of at most 100 · 17 products of numbers around 1: far below a row's share.
        np.testing.assert_allclose(recording.memory.read(recorded.slices[s].a), d_a, atol=2e-3)
        np.testing.assert_allclose(recording.memory.read(recorded.slices[s].b), d_b, atol=2e-3)


@pytest.mark.parametrize("is_cpu", [True, False], ids=["CPU's blocks", "GPU's blocks"])
def test_two_runs_add_up_and_the_same_again_bit_for_bit(recording: Recording, is_cpu: bool) -> None:
    recording = with_facts(recording, is_cpu=is_cpu)
    case = replace(CASES[5], in_use=60)
    values = values_of(case)
    results = []
    for _ in range(2):
        recorded = record(recording, case, values, start=0.0)
        recorded.program.run()
        once = [(recording.memory.read(s.a), recording.memory.read(s.b)) for s in recorded.slices]
        recorded.program.run()
        twice = [(recording.memory.read(s.a), recording.memory.read(s.b)) for s in recorded.slices]
        for one, two in zip(once, twice, strict=True):
            # The same f32 sum added to itself is exact.
            np.testing.assert_array_equal(two[0], 2 * one[0])
            np.testing.assert_array_equal(two[1], 2 * one[1])
        results.append(
            [
                recording.memory.read(recorded.z),
                recording.memory.read(recorded.d_z),
                *twice[0],
                *twice[1],
            ]
        )
    for first, second in zip(*results, strict=True):
        assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("is_cpu", [True, False], ids=["CPU's blocks", "GPU's blocks"])
def test_a_row_does_not_depend_on_the_number_of_rows(recording: Recording, is_cpu: bool) -> None:
    """Not even where a GPU takes other blocks for it."""
    recording = with_facts(recording, is_cpu=is_cpu)
    many = Case(1030, 1030, 100, 8, ((0, 36), (36, 300)))
    one = Case(1, 1, 100, 8, many.ranges)
    values = values_of(many)
    found = []
    for case, row in ((many, 700), (one, 0)):
        first = slice(700, 701) if case is one else slice(None)
        recorded = record(
            recording,
            case,
            Values(values.x[first], values.d_y[first], values.a, values.b),
            start=0.0,
        )
        recorded.program.run()
        found.append([recording.memory.read(t)[row].tobytes() for t in (recorded.z, recorded.d_z)])
    assert found[0] == found[1]


def test_every_block_gives_the_same_bits(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the tables may take another block for another number of rows."""
    recording = with_facts(recording, is_cpu=False)
    case = Case(37, 35, 900, 16, ((0, 332), (332, 344)), 1)
    values = values_of(case)
    found = set()
    for block in [(8, 1, 4, 4), (2, 2, 2, 2), (3, 4, 1, 8), (1, 1, 2, 1)]:
        tuning = Tuning((block,), 1, 16)
        monkeypatch.setattr("lora.forward.lora.GPU_TUNINGS", dict.fromkeys(GPU_TUNINGS, tuning))
        recorded = record(recording, case, values, start=0.0)
        recorded.program.run()
        check(recording, case, values, recorded)
        found.add(
            (
                recording.memory.read(recorded.z).tobytes(),
                recording.memory.read(recorded.d_z).tobytes(),
            )
        )
    # A GPU's compiler contracts products and sums differently from one loop to another: there the
    # check above, against float64, is all that holds.
    assert len(found) == 1 or recording.facts.info["adapter_type"] != "CPU"


@pytest.mark.parametrize(
    ("blocks", "short_lanes", "splits", "unroll", "sides"),
    [(16, 2, 8, 4, (4, 8)), (32, 4, 4, 2, (8, 8)), (8, 3, 16, 8, (4, 4))],
)
def test_gradients_divided_in_other_ways(
    recording: Recording,
    monkeypatch: pytest.MonkeyPatch,
    blocks: int,
    short_lanes: int,
    splits: int,
    unroll: int,
    sides: tuple[int, int],
) -> None:
    recording = with_facts(recording, is_cpu=False)
    tuning = backward_lora.Tuning(blocks, short_lanes, splits, unroll, sides)
    monkeypatch.setattr("lora.backward.lora.GPU_TUNING", tuning)
    case = Case(101, 99, 100, 24, ((0, 36), (36, 48), (48, 64)), 2)
    values = values_of(case)
    recorded = record(recording, case, values, start=0.0)
    recorded.program.run()
    check(recording, case, values, recorded)


def test_gradients_are_added_to_what_is_there(recording: Recording) -> None:
    case = replace(CASES[5], in_use=0)  # no row in use: nothing is added
    recorded = record(recording, case, values_of(case), start=3.0)
    recorded.program.run()
    for s in recorded.slices:
        assert (recording.memory.read(s.a) == 3.0).all()
        assert (recording.memory.read(s.b) == 3.0).all()


def test_reference_gradients_by_central_differences() -> None:
    case = Case(5, 5, 8, 4, ((0, 8), (12, 16)))
    values = values_of(case)
    x, d_y, a, b = (v.astype(np.float64) for v in (values.x, values.d_y, values.a, values.b))
    w = np.random.default_rng(1).normal(size=(case.out_features, case.in_features))

    def loss() -> float:
        low_rank = low_rank_reference(x, a, b, case.ranges, SCALE, case.out_features)
        return float((d_y * (x @ w.T + low_rank)).sum())

    _, d_a, d_b = gradients_reference(x, d_y, a, b, case.ranges, SCALE)
    step = 1e-3  # the loss is linear in each single element: only rounding, about 1e-16 / step
    for array, gradient in ((a, d_a), (b, d_b)):
        for index in np.ndindex(array.shape):
            kept = array[index]
            array[index] = kept + step
            above = loss()
            array[index] = kept - step
            below = loss()
            array[index] = kept
            assert gradient[index] == pytest.approx((above - below) / (2 * step), abs=1e-9)


def test_wrong_shapes_are_refused(recording: Recording) -> None:
    case = Case(7, 7, 36, 8, ((0, 36),))
    values = values_of(case)
    extent = recording.memory.extent(case.rows)
    lora = LoraFactors(
        recording.memory.upload(values.a), recording.memory.upload(values.b), 8, 1.0, case.ranges
    )
    program = Program(recording)
    narrow = recording.memory.empty((7, 32), extent=extent)
    z = recording.memory.empty((7, 8), extent=extent)
    x = recording.memory.empty((7, 36), extent=extent)
    with pytest.raises(ValueError, match="lora_project input"):
        lora_project(program, narrow, lora)
    with pytest.raises(ValueError, match="lacks columns"):
        lora_project_gradient(program, narrow, lora)
    with pytest.raises(ValueError, match="5 slices"):
        lora_gradients(program, x, z, x, z, lora, [lora] * 5)
    with pytest.raises(ValueError, match="lora_gradients z"):
        lora_gradients(program, x, x, x, z, lora, [lora])
    apart = LoraFactors(
        recording.memory.upload(values.a), recording.memory.upload(values.b), 8, 1.0, case.ranges
    )
    with pytest.raises(ValueError, match="does not lie behind"):
        lora_gradients(program, x, z, x, z, lora, [apart])
    assert not program.commands
