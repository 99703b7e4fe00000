"""The gradient of RMSNorm against float64 numpy."""

from dataclasses import dataclass

import numpy as np
import pytest

from lora.backward.rmsnorm import picked_rmsnorm_backward, rmsnorm_backward
from lora.checks.references.gather import gather_backward_reference
from lora.checks.references.rmsnorm import (
    rmsnorm_backward_reference,
    rmsnorm_reference,
    scaled_halves,
)
from lora.forward.gather import gather_rows
from lora.forward.matmul_paired import largest_of_rows
from lora.forward.model.inputs import NO_ROW
from lora.forward.model.norm import Norm
from lora.forward.part_product import SizedRows
from lora.forward.plans.stretches import Stretches
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor
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


# -- with the sizes of its rows ---------------------------------------------------------------

STALE = 12345  # where no size was written


@dataclass(frozen=True)
class SizedCase:
    """A gradient through a norm of some shape, with or without what else is written beside it."""

    recording: Recording
    rows: int
    in_use: int
    width: int
    residual: str = "in place"
    splits: int = 1
    again: bool = False

    def run(
        self, *, sized: bool, copied: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The gradient, the bits of its rows' largest, the gradient by float64, and the copy.

        Sizes are of a second dispatch where they are not `sized`; the copy is stale where it is not
        `copied`. Outputs are ranges of larger buffers.
        """
        memory, rng = self.recording.memory, np.random.default_rng(self.width)
        extent = extent_in_use(self.recording, self.rows, self.in_use)
        shape = (self.rows, self.width)
        x, past = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
        d_y = rng.normal(size=(self.splits, *shape)).astype(np.float32)
        d_y *= 10.0 ** rng.integers(-8, 8, (self.rows, 1))  # rows of all sizes
        weight = rng.normal(size=self.width).astype(np.float32)
        past_t, norm = self._range("f32", extent, self.width), Norm(memory.upload(weight), EPSILON)
        memory.write(past_t, past)
        out = past_t if self.residual == "in place" else self._range("f32", extent, self.width)
        sizes = self._range("u32", extent)
        memory.write(sizes, np.full(self.rows, STALE, np.uint32))
        halves = self._range("f16", extent, self.width)
        memory.write(halves, np.full(shape, MARKER, np.float32))
        stretches = None
        if self.splits > 1:
            partial = memory.upload(d_y.reshape(-1, self.width))
            stretches = Stretches(partial, self.splits)
        program = Program(self.recording)
        rmsnorm_backward(
            program, activation(self.recording, x, extent), norm,
            activation(self.recording, d_y[0], extent),
            residual=None if self.residual == "none" else past_t,
            out=SizedRows(out, sizes if sized else None, halves if copied else None),
            stretches=stretches,
            normed=self._range("f32", extent, self.width) if self.again else None,
        )  # fmt: skip
        if not sized:
            largest_of_rows(program, out, self.width, None, out=sizes, label="apart")
        found = run_twice(program, out)
        wanted = rmsnorm_backward_reference(x, weight, d_y.sum(axis=0, dtype=np.float64), EPSILON)
        wanted += past if self.residual != "none" else 0
        return found, memory.read(sizes), wanted, memory.read(halves)

    def _range(self, dtype: str, extent: Extent, *columns: int) -> Tensor:
        """The middle third of a tensor."""
        whole = self.recording.memory.empty((192 + extent.maximum, *columns), dtype, extent=extent)
        return whole.slice(64, 64 + extent.maximum)


_SIZED = ("rows", "in_use", "width", "residual", "splits", "again")
_SIZED_CASES = [
    (1, 1, 4, "none", 1, False),
    (3, 2, 36, "separate", 1, True),
    (67, 66, 100, "in place", 3, False),
    (3, 2, 2052, "in place", 1, True),
]


@pytest.mark.parametrize("is_cpu", [True, False], ids=["CPU's lanes", "GPU's lanes"])
@pytest.mark.parametrize(
    _SIZED,
    [*_SIZED_CASES, (19, 17, 576, "in place", 2, True), (3, 2, 2052, "none", 1, True),
     (2, 2, 1028, "separate", 2, False)],
)  # fmt: skip
def test_the_sizes_of_its_rows(
    recording: Recording, rows: int, in_use: int, width: int, residual: str, splits: int,
    again: bool, is_cpu: bool,
) -> None:  # fmt: skip
    """Those that a dispatch of their own finds, beside the same gradient, bit for bit."""
    recording = with_facts(recording, is_cpu=is_cpu)
    case = SizedCase(recording, rows, in_use, width, residual, splits, again)
    found, sizes, wanted, _ = case.run(sized=True)
    apart, sizes_apart, _, _ = case.run(sized=False)
    assert found.tobytes() == apart.tobytes() and sizes.tobytes() == sizes_apart.tobytes()
    largest = sizes.view(np.float32)[:in_use]
    assert (largest == np.abs(found[:in_use]).max(axis=1)).all() and (sizes[in_use:] == STALE).all()
    # As in test_rmsnorm_backward, of rows whose largest gradients are other powers of ten.
    of_row = np.abs(wanted).max(axis=1, keepdims=True)[:in_use]
    np.testing.assert_allclose(found[:in_use] / of_row, wanted[:in_use] / of_row, atol=1e-5)


@pytest.mark.parametrize("is_cpu", [True, False], ids=["CPU's lanes", "GPU's lanes"])
@pytest.mark.parametrize(_SIZED, _SIZED_CASES)
def test_a_copy_in_f16(
    recording: Recording, rows: int, in_use: int, width: int, residual: str, splits: int,
    again: bool, is_cpu: bool,
) -> None:  # fmt: skip
    """What tiles of f16 make of the rows; these and their sizes have the bits that they had."""
    needs_halves(recording.facts)
    case = SizedCase(
        with_facts(recording, is_cpu=is_cpu), rows, in_use, width, residual, splits, again
    )
    found, sizes, _, halves = case.run(sized=True, copied=True)
    alone, sizes_alone, _, stale = case.run(sized=True)
    assert found.tobytes() == alone.tobytes() and sizes.tobytes() == sizes_alone.tobytes()
    assert halves[:in_use].tobytes() == scaled_halves(found[:in_use]).tobytes()
    assert (halves[in_use:] == stale[in_use:]).all() and (stale == MARKER).all()
    assert (np.abs(halves[:in_use]).max(axis=1) >= 16).all()


def test_the_size_of_a_row_that_is_no_number(recording: Recording) -> None:
    """Its bits are larger than those of infinity, for a product to show it; so does its copy."""
    needs_halves(recording.facts)
    extent, memory = recording.memory.extent(3), recording.memory
    d_y = np.ones((3, 36), np.float32)
    d_y[1, 30], d_y[2, 7] = np.inf, np.nan
    out, sizes = marked(recording, extent, 36), memory.empty((3,), "u32", extent=extent)
    halves = memory.empty((3, 36), "f16", extent=extent)
    program = Program(recording)
    rmsnorm_backward(
        program, activation(recording, np.ones((3, 36), np.float32), extent),
        Norm(memory.upload(np.ones(36)), EPSILON), activation(recording, d_y, extent),
        out=SizedRows(out, sizes, halves),
    )  # fmt: skip
    program.run()
    found, copy = memory.read(sizes), memory.read(halves)
    assert found[0] < 0x7F800000 <= found[1] and found[2] > 0x7F800000
    assert np.isfinite(copy).all(axis=1).tolist() == [True, False, False]


@pytest.mark.parametrize("wrong", ["f16", "f32 sizes", "shape", "no sizes", "copy", "copy's shape"])
def test_sizes_of_another_kind_are_refused(recording: Recording, wrong: str) -> None:
    extent, memory = recording.memory.extent(2), recording.memory
    out = memory.empty((2, 36), "f16" if wrong == "f16" else "f32", extent=extent)
    dtype, n = ("f32" if wrong == "f32 sizes" else "u32"), 3 if wrong == "shape" else 2
    x = activation(recording, np.ones((2, 36), np.float32), extent)
    sizes = None if wrong == "no sizes" else memory.empty((n,), dtype)
    halves = None
    if wrong in ("no sizes", "copy", "copy's shape"):
        columns = 32 if wrong == "copy's shape" else 36
        halves = memory.empty((2, columns), "f32" if wrong == "copy" else "f16")
    with pytest.raises(ValueError, match="sizes|copy"):
        rmsnorm_backward(
            Program(recording), x, Norm(memory.upload(np.ones(36)), EPSILON), x,
            out=SizedRows(out, sizes, halves),
        )  # fmt: skip


# -- of rows that were picked -----------------------------------------------------------------


def test_reference_of_picked_rows_is_the_derivative() -> None:
    rng = np.random.default_rng(0)
    x, direction, d_y = (rng.normal(size=(n, 20)) for n in (9, 9, 5))
    weight, picked = rng.normal(size=20), np.array([0, 2, 3, 7, 8])
    slope = central_difference(
        lambda v: float((rmsnorm_reference(v[picked], weight, EPSILON) * d_y).sum()), x, direction
    )
    d_picked = rmsnorm_backward_reference(x[picked], weight, d_y, EPSILON)
    expected = (gather_backward_reference(d_picked, picked, 9) * direction).sum()
    assert slope == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("is_cpu", [True, False], ids=["CPU's lanes", "GPU's lanes"])
@pytest.mark.parametrize(
    ("rows", "in_use", "n_picked", "width", "sized", "copied"),
    [
        (1, 1, 1, 4, True, False),
        (3, 2, 0, 36, False, False),
        (67, 66, 20, 100, True, True),
        (130, 130, 129, 576, False, False),
        (5, 4, 3, 2052, True, True),
    ],
)
def test_picked_rows(
    recording: Recording, rows: int, in_use: int, n_picked: int, width: int, sized: bool,
    copied: bool, is_cpu: bool,
) -> None:  # fmt: skip
    """To the bits of the norm's gradient and a gather after it; other rows get zeros."""
    recording = with_facts(recording, is_cpu=is_cpu)
    memory, rng = recording.memory, np.random.default_rng(rows)
    picked = np.sort(rng.choice(in_use, n_picked, replace=False))
    slots = np.full(rows, NO_ROW, np.uint32)
    slots[picked] = np.arange(n_picked)
    shape = (n_picked + 3, width)
    x, d_y = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    weight = rng.normal(size=width).astype(np.float32)
    targets = extent_in_use(recording, n_picked + 3, n_picked)
    extent = extent_in_use(recording, rows, in_use)
    x_t, d_t = (activation(recording, values, targets) for values in (x, d_y))
    slots_t, norm = activation(recording, slots, extent), Norm(memory.upload(weight), EPSILON)
    d_x, apart = (marked(recording, extent, width) for _ in range(2))
    sizes = memory.upload(np.full(rows, STALE, np.uint32))
    program, two = Program(recording), Program(recording)
    halves = None
    if copied:
        needs_halves(recording.facts)
        halves = typed_marked(recording, "f16", extent, width)
    out = SizedRows(d_x, sizes if sized else None, halves)
    picked_rmsnorm_backward(program, x_t, norm, d_t, slots_t, out)
    result = run_twice(program, d_x)
    gather_rows(two, rmsnorm_backward(two, x_t, norm, d_t), slots_t, extent, out=apart)
    two.run()
    assert result.tobytes() == memory.read(apart).tobytes()
    d_picked = rmsnorm_backward_reference(x[:n_picked], weight, d_y[:n_picked], EPSILON)
    expected = gather_backward_reference(d_picked, picked, rows)
    # As in test_rmsnorm_backward.
    np.testing.assert_allclose(result[:in_use], expected[:in_use], rtol=1e-5, atol=3e-6)
    assert (result[in_use:] == MARKER).all()
    if halves is not None:
        copy = memory.read(halves)
        assert copy[:in_use].tobytes() == scaled_halves(result[:in_use]).tobytes()
        assert (copy[in_use:] == MARKER).all()
    largest = np.abs(result).max(axis=1).view(np.uint32)
    assert (
        memory.read(sizes) == np.where(sized & (np.arange(rows) < in_use), largest, STALE)
    ).all()
