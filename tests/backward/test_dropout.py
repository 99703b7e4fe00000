"""Dropout before the low-rank factors, and its gradients, against numpy with the same masks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lora.backward.dropout import dropout_input_gradient
from lora.backward.lora import lora_gradients, lora_project_gradient, most_slices
from lora.checks.tensors import extent_in_use, normal, typed, typed_marked
from lora.forward.dropout import GroupDropout, hashed_columns, mask, matrix_key, row_keys, scale_of
from lora.forward.lora import lora_project
from lora.forward.model.factors import LoraFactors
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.half_tensors import needs_halves
from tests.support.kernels import central_difference, with_facts

ROWS, IN_USE, WIDTH, RANK, SCALE, P = 21, 19, 132, 8, 1.7, 0.3
RANGES = ((0, 36), (40, 52), (52, 64))
N_B = sum(stop - start for start, stop in RANGES)
KEYS = [matrix_key(name) for name in ("q", "k", "v")]
ROW_KEYS = row_keys(3, 7, [4, 1, 9], [8, 8, 5])


def masks() -> list[np.ndarray]:
    return [mask(ROW_KEYS[:IN_USE], key, WIDTH, P) * scale_of(P) for key in KEYS]


def forward(x: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The low-rank part of y [rows, 64], in float64."""
    y, row = np.zeros((len(x), 64)), 0
    for g, ((start, stop), kept) in enumerate(zip(RANGES, masks(), strict=True)):
        z = (kept * x) @ a[g * RANK : (g + 1) * RANK].T
        y[:, start:stop] = SCALE * z @ b[row : row + stop - start].T
        row += stop - start
    return y


@pytest.mark.parametrize(
    ("is_cpu", "dtype", "accumulate"),
    [(True, "f32", False), (False, "f32", True), (False, "f16", False)],
)
def test_dropout(recording: Recording, is_cpu: bool, dtype: str, accumulate: bool) -> None:
    if dtype == "f16":
        needs_halves(recording.facts)
    recording = with_facts(recording, is_cpu=is_cpu)
    kind = np.float16 if dtype == "f16" else np.float32
    x, d_y = (
        normal(seed, ROWS, n).astype(kind).astype(np.float32) for seed, n in ((1, WIDTH), (2, 64))
    )
    a, b = normal(3, 3 * RANK, WIDTH), normal(4, N_B, RANK)
    extent, program = extent_in_use(recording, ROWS, IN_USE), Program(recording)

    def factors(a: np.ndarray, b: np.ndarray) -> LoraFactors:
        first = -(-a.size // 64) * 64
        flat = np.zeros(first + b.size, np.float32)
        flat[: a.size], flat[first:] = a.reshape(-1), b.reshape(-1)
        whole = recording.memory.upload(flat)
        return LoraFactors(
            whole.slice(0, a.size).reshape(*a.shape),
            whole.slice(first, flat.size).reshape(*b.shape),
            RANK, SCALE, RANGES,
        )  # fmt: skip

    lora = factors(a, b)
    slices = [factors(np.zeros_like(a), np.zeros_like(b)) for _ in range(3)]
    keys = recording.memory.empty((ROWS,), "u32", extent=extent)
    recording.memory.write(keys, ROW_KEYS)
    dropout = GroupDropout(P, keys, recording.memory.constant_uniform((*KEYS, 0)))
    x_t, d_y_t = typed(recording, x, dtype, extent), typed(recording, d_y, dtype, extent)
    out = typed_marked(recording, dtype, extent, WIDTH)
    z = lora_project(program, x_t, lora, dropout=dropout)
    d_z = lora_project_gradient(program, d_y_t, lora)
    lora_gradients(program, x_t, z, d_y_t, d_z, lora, slices, dropout=dropout)
    dropout_input_gradient(program, d_z, lora, dropout, out=out, accumulate=accumulate)
    program.run()

    used = slice(0, IN_USE)
    d_b, d_x = np.zeros((N_B, RANK)), np.zeros((IN_USE, WIDTH))
    d_a, row = np.zeros(a.shape), 0
    for g, ((start, stop), kept) in enumerate(zip(RANGES, masks(), strict=True)):
        low, rows = slice(g * RANK, (g + 1) * RANK), slice(row, row + stop - start)
        d_zg = SCALE * d_y[used, start:stop].astype(np.float64) @ b[rows]
        z_g = (kept * x[used]) @ a[low].T.astype(np.float64)
        np.testing.assert_allclose(recording.memory.read(z)[used, low], z_g, atol=1e-4)
        d_b[rows] = SCALE * d_y[used, start:stop].T.astype(np.float64) @ z_g
        d_a[low] = d_zg.T @ (kept * x[used])
        d_x += kept * (d_zg @ a[low])
        row += stop - start
    read = recording.memory.read
    np.testing.assert_allclose(sum(read(s.a).astype(float) for s in slices), d_a, atol=2e-3)
    np.testing.assert_allclose(sum(read(s.b).astype(float) for s in slices), d_b, atol=4e-3)
    expected = d_x + (-7.0 if accumulate else 0.0)
    atol = np.abs(d_x).max() * (1e-3 if dtype == "f16" else 1e-6)
    np.testing.assert_allclose(read(out)[used].astype(float), expected, atol=atol)
    assert (read(out)[IN_USE:] == -7.0).all()
    # The formula above is the derivative of the forward's.
    direction = normal(9, IN_USE, WIDTH).astype(np.float64)
    slope = central_difference(
        lambda v: float((forward(v, a, b) * d_y[used]).sum()), x[used].astype(np.float64), direction
    )
    assert slope == pytest.approx(float((d_x * direction).sum()), rel=1e-6)


def test_four_slices_leave_no_room_for_the_keys(recording: Recording) -> None:
    """Of eight storage buffers; of nine they do."""
    assert most_slices(with_facts(recording, most_storage_buffers=9).facts, True) == 4
    recording = with_facts(recording, most_storage_buffers=8)
    assert (most_slices(recording.facts, True), most_slices(recording.facts, False)) == (3, 4)
    extent = extent_in_use(recording, 4, 4)
    keys = recording.memory.empty((4,), "u32", extent=extent)
    dropout = GroupDropout(P, keys, recording.memory.constant_uniform((1, 2, 3, 4)))
    flat = recording.memory.empty((128,))
    lora = LoraFactors(
        flat.slice(0, 16).reshape(4, 4), flat.slice(64, 80).reshape(4, 4), 4, 1.0, ((0, 4),)
    )
    four = [recording.memory.empty((4, 4), extent=extent) for _ in range(4)]
    with pytest.raises(ValueError, match="4 slices, expected 1 to 3"):
        lora_gradients(Program(recording), *four, lora, [lora] * 4, dropout=dropout)


def test_masks_keep_what_the_probability_says_and_differ() -> None:
    keys = row_keys(0, 0, range(16), [64] * 16)
    for p in (0.05, 0.5, 0.9):
        kept = mask(keys, KEYS[0], 1024, p)
        assert kept.mean() == pytest.approx(1 - p, abs=4 * (p * (1 - p) / kept.size) ** 0.5 + 1e-5)
        for axis in (0, 1):  # neither rows nor columns are favoured
            spread = (p * (1 - p) / kept.shape[axis]) ** 0.5
            assert np.abs(kept.mean(axis) - (1 - p)).max() < 6 * spread
    one = mask(keys, KEYS[0], 1024, 0.5)
    others = [
        mask(keys, KEYS[1], 1024, 0.5),
        mask(row_keys(1, 0, range(16), [64] * 16), KEYS[0], 1024, 0.5),
        mask(row_keys(0, 1, range(16), [64] * 16), KEYS[0], 1024, 0.5),
        np.roll(one, 1, 0), np.roll(one, 1, 1), np.roll(one, 64, 0), np.roll(one, 4, 1),
    ]  # fmt: skip
    for other in others:
        assert (one == other).mean() == pytest.approx(0.5, abs=0.01)


def outcomes_differ(fours: np.ndarray, p: float) -> float:
    """Chi-squared of the sixteen outcomes of four booleans against independent ones."""
    outcomes = np.bincount(np.ravel(fours @ [1, 2, 4, 8]).astype(int), minlength=16)
    n_kept = np.array([bin(outcome).count("1") for outcome in range(16)])
    expected = outcomes.sum() * (1 - p) ** n_kept * p ** (4 - n_kept)
    return float(np.sum((outcomes - expected) ** 2 / expected))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("matrix", KEYS)
def test_columns_are_dropped_independently(matrix: int, p: float) -> None:
    """All outcomes of four columns of an eight, which come out of one round, of columns of other
    eights, of rows and of both, by a chi-squared test: a generator as good as random passes the
    bound of 64 but once in twenty million times."""
    keys = row_keys(3, 0, range(64), [256] * 64)
    kept = mask(keys, matrix, 64, p)
    eights = kept.reshape(-1, 8)
    for columns in itertools.combinations(range(8), 4):
        assert outcomes_differ(eights[:, columns], p) < 64, columns
    for apart in (1, 2, 3, 8, 16, 17, 31):
        along = np.stack([np.roll(kept, n * apart, 1) for n in range(4)], -1)
        assert outcomes_differ(along, p) < 64, apart
        down = np.stack([np.roll(kept, n * apart, 0) for n in range(4)], -1)
        assert outcomes_differ(down, p) < 64, apart
        corners = [kept, np.roll(kept, apart, 0), np.roll(kept, apart, 1)]
        square = np.stack([*corners, np.roll(kept, (apart, apart), (0, 1))], -1)
        assert outcomes_differ(square, p) < 64, apart


def test_keys_follow_the_example_and_not_its_place() -> None:
    one, two = row_keys(5, 2, [8], [6]), row_keys(5, 2, [3], [4])
    assert row_keys(5, 2, [3, 8], [4, 6]).tolist() == [*two, *one]
    assert row_keys(5, 2, [8], [9])[:6].tolist() == one.tolist()
    uniform = hashed_columns(row_keys(0, 0, [1, 2], [500, 500]), 7, 64) / 2.0**32
    assert uniform.mean() == pytest.approx(0.5, abs=0.01)
    assert uniform.std() == pytest.approx(12**-0.5, abs=0.01)
