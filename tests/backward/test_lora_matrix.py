"""Low-rank kernels on matrix units against float64; in plain WGSL without such units."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora.checks.references.lora import gradients_reference
from lora.forward.lora_matrix import gradient_cut, projection_cut
from lora.forward.matmul_matrix import EMULATED
from lora.shaders.recording import Recording
from tests.support.attention_cuts import on_matrix_units
from tests.support.kernels import with_facts
from tests.support.lora_cases import SCALE, UNTOUCHED, Case, Recorded, Values, record, values_of

CASES = [
    Case(1, 1, 4, 4, ((0, 4),)),
    Case(7, 3, 36, 16, ((0, 100),), 4),
    Case(65, 64, 576, 8, ((0, 64), (64, 128)), 4),
    Case(65, 40, 260, 16, ((8, 40), (100, 164)), 2),  # the group's middle matrix is not adapted
    Case(70, 70, 132, 32, ((0, 300),), 1),
    Case(65, 0, 36, 8, ((0, 16),), 2),
    Case(37, 35, 2052, 12, ((0, 1032), (1032, 1044)), 4),
]
# A mask for each member, members of scales of their own, and both.
DROPPED = [
    Case(7, 3, 36, 16, ((0, 100),), 4, dropout=0.3),
    Case(65, 40, 260, 16, ((8, 40), (100, 164)), 2, dropout=0.1),
    Case(65, 64, 576, 8, ((0, 64), (64, 128), (128, 140)), 4, 0.5, (0.5, 3.0, 1.0)),
    Case(37, 35, 2052, 12, ((0, 1032), (1032, 1044)), 3, 0.25),
    Case(65, 0, 36, 8, ((0, 16),), 2, dropout=0.3),
    Case(65, 64, 132, 8, ((0, 64), (64, 128)), 4, member_scales=(0.5, 3.0)),
]
# Of columns that DoRA has scaled.
SCALED = [
    Case(1, 1, 4, 4, ((0, 4),), dora=True),
    Case(65, 40, 260, 16, ((8, 40), (100, 164)), 2, dora=True),
    Case(70, 69, 36, 8, ((0, 300), (300, 316)), 4, member_scales=(0.5, 3.0), dora=True),
    Case(65, 0, 36, 8, ((0, 16),), 2, dora=True),
]
# Of rows of f32 that have a copy in f16.
COPIED = [
    Case(1, 1, 4, 4, ((0, 4),), copied=True),
    Case(65, 40, 260, 16, ((8, 40), (100, 164)), 2, copied=True),
    Case(37, 35, 2052, 12, ((0, 1032), (1032, 1044)), 4, 0.25, copied=True),
    Case(65, 0, 36, 8, ((0, 16),), 2, copied=True),
    Case(65, 63, 200, 8, ((0, 136), (136, 280)), 4, copied=True),  # whole eights
    Case(65, 40, 36, 8, ((8, 40), (40, 104)), 2, dora=True, copied=True),
]
LARGE = Case(200, 199, 580, 16, ((0, 576), (576, 768), (768, 964)), 3)


def halves(case: Case) -> Values:
    """Numbers that f16 has."""
    full = values_of(case)
    return Values(
        *(v.astype(np.float16).astype(np.float32) for v in (full.x, full.d_y, full.a, full.b))
    )


def within(actual: np.ndarray, expected: np.ndarray, size: np.ndarray, n: int, half: bool) -> None:
    """Products are exact and sums f32, on units truncated; with `half` one side was rounded to f16.

    Roundings are independent: the worst of thousands is off by some four standard deviations.
    """
    bound = 2.0**-24 * (16.0 + 16.0 * np.sqrt(n)) * size
    if half:
        bound += 4 * 2.0**-11 * size / np.sqrt(n)
    excess = np.abs(actual - expected) - bound
    assert (excess <= 1e-30).all(), f"{excess.max()} above a bound of {bound.flat[excess.argmax()]}"


def summed(recording: Recording, recorded: Recorded) -> tuple[np.ndarray, np.ndarray]:
    """d_A and d_B over the slices."""
    read = recording.memory.read
    a, b = ([read(getattr(s, name)) for s in recorded.slices] for name in "ab")
    return np.sum(a, axis=0, dtype=np.float64), np.sum(b, axis=0, dtype=np.float64)


Written = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def reference(case: Case, x: np.ndarray, d_y: np.ndarray, a: np.ndarray, b: np.ndarray) -> Written:
    """z, d_z, d_A and d_B of the rows in use, in float64."""
    z, d_z = np.zeros((2, len(x), case.width))
    d_a, d_b = np.zeros(a.shape), np.zeros(b.shape)
    row = 0
    for g, ((start, stop), kept) in enumerate(zip(case.ranges, case.masks(), strict=True)):
        low, of_b = slice(g * case.rank, (g + 1) * case.rank), slice(row, row + stop - start)
        d_p = case.columns[0, start:stop] * d_y[:, start:stop].astype(np.float64)
        one = (kept * x, d_p, a[low], b[of_b])
        scale = case.member_scales[g] if case.member_scales else 1.0
        d_z[:, low], d_a[low], d_b[of_b] = gradients_reference(
            *one, [(0, stop - start)], scale * case.scale
        )
        z[:, low] = scale * one[0] @ one[2].T
        row += stop - start
    return z, d_z, d_a, d_b


def check(recording: Recording, case: Case, values: Values, recorded: Recorded) -> None:
    """All that was written."""
    used, read = slice(0, case.in_use), recording.memory.read
    arrays = (values.x[used], values.d_y[used], values.a, values.b)
    longest = max(stop - start for start, stop in case.ranges)
    z, d_z, d_a, d_b = reference(case, *arrays)
    size_z, size_d_z, size_a, size_b = reference(case, *(np.abs(v) for v in arrays))
    found_z, found_d_z = read(recorded.z), read(recorded.d_z)
    within(found_z[used], z, size_z, case.in_features, False)
    within(found_d_z[used], d_z, size_d_z, longest, False)
    assert (found_z[case.in_use :] == UNTOUCHED).all()
    assert (found_d_z[case.in_use :] == UNTOUCHED).all()
    found_a, found_b = summed(recording, recorded)
    within(found_a, d_a, size_a, max(1, case.in_use), True)
    within(found_b, d_b, size_b, max(1, case.in_use), True)
    if case.dora:
        check_magnitudes(recording, case, arrays[1], recorded)


def check_magnitudes(recording: Recording, case: Case, d_y: np.ndarray, recorded: Recorded) -> None:
    """Sums of f32, of products that are exact."""
    found = np.zeros(case.n_b)
    for one in recorded.slices:
        assert one.magnitude is not None
        found += recording.memory.read(one.magnitude)
    products = d_y.astype(np.float64) * case.p[: case.in_use]
    places = np.concatenate([np.arange(start, stop) for start, stop in case.ranges])
    expected, size = (
        (case.columns[1] * values.sum(0))[places] for values in (products, np.abs(products))
    )
    assert (np.abs(found - expected) <= 2.0**-22 * np.sqrt(case.rows) * size).all()


@pytest.mark.parametrize("case", [*CASES, *DROPPED, *SCALED, *COPIED], ids=str)
def test_against_float64(recording: Recording, case: Case) -> None:
    recording = on_matrix_units(recording)
    values = halves(case)
    recorded = record(recording, case, values, 0.0, "f16", "f32")
    templates = [dispatch.template for dispatch in recorded.program.dispatches]
    assert [t for t in templates if t.startswith("lora")] == [
        "lora_project_matrix", "lora_project_matrix", "lora_gradient_matrix",
    ]  # fmt: skip
    recorded.program.run()
    check(recording, case, values, recorded)


@pytest.mark.parametrize("case", DROPPED[:2], ids=str)
def test_masks_are_those_of_plain_kernels(recording: Recording, case: Case) -> None:
    """With A of zeros but a one in each row, z is what is left of x."""
    a = np.zeros((case.width, case.in_features), np.float32)
    a[np.arange(case.width), (7 * np.arange(case.width)) % case.in_features] = 1.0
    values, found = replace(halves(case), a=a), []
    for of in (replace(recording, precision="f16"), on_matrix_units(recording)):
        recorded = record(of, case, values, 0.0)
        recorded.program.run()
        found.append(of.memory.read(recorded.z)[: case.in_use])
    assert 0.05 < (found[0] == 0).mean() < 0.5
    np.testing.assert_array_equal(found[0] == 0, found[1] == 0)


def test_many_rows_of_halves(recording: Recording) -> None:
    recording = on_matrix_units(recording)
    values = halves(LARGE)
    recorded = record(recording, LARGE, values, 0.0, "f16", "f16")
    recorded.program.run()
    check(recording, LARGE, values, recorded)


def test_on_any_driver(recording: Recording) -> None:
    """Also by software that has units."""
    recording = on_matrix_units(recording, on_software=True)
    for dropout, dora in ((0.0, False), (0.3, False), (0.0, True)):
        case = Case(20, 19, 40, 8, ((0, 24), (24, 40)), 2, dropout, dora=dora)
        recorded = record(recording, case, halves(case), 0.0, "f16", "f16")
        recorded.program.run()
        check(recording, case, halves(case), recorded)


def test_what_is_below_f16_is_kept(recording: Recording) -> None:
    """After its first steps B is 1e-7, say, and d_z below f16's smallest number in most rows."""
    recording = on_matrix_units(recording)
    case = CASES[2]
    full = halves(case)
    small = (2.0**-22 * full.b).astype(np.float32)
    d_y = full.d_y.copy()
    d_y[:60] *= 2.0**-6  # rows far smaller than others, before them
    values = Values(full.x, d_y, full.a, small)
    recorded = record(recording, case, values, 0.0, "f16", "f16")
    recorded.program.run()
    used = slice(0, case.in_use)
    _, d_a, d_b = gradients_reference(
        values.x[used], values.d_y[used], values.a, small, case.ranges, SCALE
    )
    found_a, found_b = summed(recording, recorded)
    assert np.abs(d_a).max() < 1e-3
    assert np.abs(found_a - d_a).max() < 2e-3 * np.abs(d_a).max()
    assert np.abs(found_b - d_b).max() < 2e-3 * np.abs(d_b).max()


@pytest.mark.parametrize("copied", [False, True])
def test_rows_of_f32_have_any_size(recording: Recording, copied: bool) -> None:
    """The residual stream's gradient may pass what f16 holds, and be below it beside that."""
    recording = on_matrix_units(recording, on_software=True)
    case = Case(70, 69, 40, 8, ((0, 24), (24, 40)), 2, copied=copied)
    full = halves(case)
    sizes = 10.0 ** np.random.default_rng(5).integers(-12, 12, (case.rows, 1))
    values = replace(full, d_y=(full.d_y * sizes).astype(np.float32))
    recorded = record(recording, case, values, 0.0, "f16", "f32")
    recorded.program.run()
    used = slice(0, case.in_use)
    d_z, d_a, d_b = gradients_reference(
        values.x[used], values.d_y[used], values.a, values.b, case.ranges, SCALE
    )
    found_z = recording.memory.read(recorded.d_z)[used]
    if copied:  # the same numbers in the same order
        rows = record(recording, replace(case, copied=False), values, 0.0, "f16", "f32")
        rows.program.run()
        assert recording.memory.read(rows.d_z)[used].tobytes() == found_z.tobytes()
    # Rows of d_y are rounded to 2^-12 of their numbers each: of d_z no row is lost beside others.
    row = np.abs(d_z).max(axis=1, keepdims=True)
    assert (np.abs(found_z - d_z) < 2e-3 * row).all()
    found_a, found_b = summed(recording, recorded)
    assert np.abs(found_a - d_a).max() < 2e-3 * np.abs(d_a).max()
    assert np.abs(found_b - d_b).max() < 2e-3 * np.abs(d_b).max()


def test_numbers_that_are_not_finite_stay_so(recording: Recording) -> None:
    recording = on_matrix_units(recording)
    case, full = CASES[2], halves(CASES[2])
    d_y = full.d_y.copy()
    d_y[5, 7] = np.inf
    recorded = record(recording, case, replace(full, d_y=d_y), 0.0, "f16", "f16")
    recorded.program.run()
    d_a, d_b = summed(recording, recorded)
    assert not np.isfinite(d_a).all() and not np.isfinite(d_b).all()


def test_two_runs_add_up_and_rows_do_not_depend_on_their_number(recording: Recording) -> None:
    recording = on_matrix_units(recording)
    values = halves(LARGE)
    recorded = record(recording, LARGE, values, 0.0, "f16", "f16")
    recorded.program.run()
    once = summed(recording, recorded)
    recorded.program.run()
    for first, both in zip(once, summed(recording, recorded), strict=True):
        np.testing.assert_array_equal(2 * first, both)
    few = replace(LARGE, rows=20, in_use=20)
    row = Values(values.x[:20], values.d_y[:20], values.a, values.b)
    alone = record(recording, few, row, 0.0, "f16", "f16")
    alone.program.run()
    for name in ("z", "d_z"):
        among = recording.memory.read(getattr(recorded, name))[:20]
        assert recording.memory.read(getattr(alone, name)).tobytes() == among.tobytes()


@pytest.mark.parametrize("rows", [200, 37])
def test_many_rows_of_a_workgroup(
    recording: Recording, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with thousands of rows: the bits of fewer in one."""
    recording = on_matrix_units(recording)
    case = replace(LARGE, rows=rows, in_use=rows - 1)
    full, found = halves(LARGE), []
    values = replace(full, x=full.x[:rows], d_y=full.d_y[:rows])
    for many in (10**6, 1):
        monkeypatch.setattr("lora.forward.lora_matrix._MANY_GROUPS", many)
        recorded = record(recording, case, values, 0.0, "f16", "f16")
        blocks = [d.constants.get("block_rows") for d in recorded.program.dispatches[:2]]
        # z of 48 columns takes too much memory.
        assert blocks == ([16, 64] if many == 1 else [16, 16])
        recorded.program.run()
        found.append([recording.memory.read(t).tobytes() for t in (recorded.z, recorded.d_z)])
    assert found[0] == found[1]


@pytest.mark.parametrize("case", [
    Case(200, 199, 260, 8, ((0, 132), (132, 200)), 1),
    Case(140, 129, 40, 8, ((0, 24), (24, 40)), 2, dropout=0.3),
    Case(300, 270, 200, 8, ((0, 136), (136, 280)), 2, copied=True),
], ids=str)  # fmt: skip
def test_large_tiles_of_long_stretches(
    recording: Recording, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with thousands of rows of f16."""
    monkeypatch.setattr("lora.forward.lora_matrix._LONG_STRETCH", 1)
    recording = with_facts(on_matrix_units(recording), workgroup_memory=49152)
    values = halves(case)
    recorded = record(recording, case, values, 0.0, "f16", "f32" if case.copied else "f16")
    gradients = [d for d in recorded.program.dispatches if "n_slices" in d.constants]
    assert [d.constants["depth"] for d in gradients] == [128]
    recorded.program.run()
    check(recording, case, values, recorded)


def test_where_units_are_taken(recording: Recording) -> None:
    gpu = with_facts(
        replace(recording, precision="f16"),
        is_cpu=False, matrix_shapes=(EMULATED,), most_lanes=1024, workgroup_memory=49152,
    )  # fmt: skip

    def taken(of: Recording, columns: int = 16) -> tuple[bool, bool]:
        projected = projection_cut(of, 512, columns, 1, transposed=False)
        return projected is not None, gradient_cut(of, (columns, columns)) is not None

    assert taken(gpu) == (True, True)
    assert taken(replace(gpu, precision="f32")) == (False, False)
    assert taken(replace(gpu, body="tiled")) == (False, False)
    assert taken(with_facts(gpu, matrix_shapes=())) == (False, False)
    assert taken(with_facts(gpu, most_lanes=128)) == (False, False)
    assert taken(gpu, 4092) == (False, False)  # too much for workgroup memory, in no whole pieces
    cuts = [projection_cut(gpu, rows, 48, 1, transposed=False) for rows in (16, 512, 2064, 8192)]
    found = [(c["block_rows"], c["columns"], c["depth"]) for c in cuts if c is not None]
    assert found == [(16, 16, 512), (16, 16, 512), (16, 16, 256), (32, 48, 256)]
    tiles = [
        gradient_cut(gpu, shorts, rows)
        for shorts, rows in (((32, 16), 511), ((32, 16), 512), ((48, 16), 512))
    ]
    assert [cut and cut["depth"] for cut in tiles] == [64, 128, 64]  # the last for its memory
    # Many rows of large ranks, and of many columns of d_y, which B is read again for.
    wide = [projection_cut(gpu, 8192, n, 1, transposed=False) for n in (64, 96)]
    many = [projection_cut(gpu, 8192, 16, members, transposed=True) for members in (1, 2)]
    found = [(c["block_rows"], c["columns"], c["depth"]) for c in wide + many if c is not None]
    assert found == [(16, 64, 256), (16, 96, 128), (32, 16, 256), (64, 16, 128)]
