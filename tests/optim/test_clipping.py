"""The gradient's norm and clip factor against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest

from lora.checks.references.optim import clip_reference
from lora.optim.clipping import flat_ranges, gradient_norm
from lora.shaders.program import Dispatch, Program
from lora.shaders.recording import Recording
from tests.support.kernels import with_facts
from tests.support.recorded_optimizer import few_ranges, padded, random_slices


def run(
    recording: Recording,
    slices: list[np.ndarray],
    max_norm: float | None,
    max_range: int | None = None,
    loss_scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """The state [4] and what the first slice holds afterwards."""
    tensors = [recording.memory.upload(s) for s in slices]
    state = recording.memory.empty((4,))
    program = Program(recording)
    gradient_norm(
        program, tensors, state, max_norm=max_norm, loss_scale=loss_scale, max_range=max_range
    )
    program.run()
    return recording.memory.read(state), recording.memory.read(tensors[0])


@pytest.mark.parametrize("n", [4, 60, 64, 68, 4096, 65_600, 100_004])
@pytest.mark.parametrize(("n_slices", "max_range"), [(1, None), (4, None), (3, 1000)])
@pytest.mark.parametrize("is_cpu", [True, False], ids=["CPU's lanes", "GPU's lanes"])
def test_norm(
    recording: Recording, n: int, n_slices: int, max_range: int | None,
    is_cpu: bool,
) -> None:  # fmt: skip
    recording = with_facts(recording, is_cpu=is_cpu)  # both run on any device
    slices = random_slices(np.random.default_rng(n), n, n_slices)
    state, total = run(recording, slices, 1.0, few_ranges(n, max_range))
    expected = slices[0]
    for s in slices[1:]:
        expected = expected + s  # in f32 and in order: the device must agree bit for bit
    np.testing.assert_array_equal(total, expected)
    norm, factor = clip_reference(expected, 1.0)
    # Few terms a lane and then a tree: some roundings of 2^-24 each.
    assert state == pytest.approx([norm, factor, 1.0, 0.0], rel=1e-6)


def test_ten_million_elements(recording: Recording) -> None:
    n = 10_000_000
    values = np.random.default_rng(0).normal(size=n).astype(np.float32)
    state, _ = run(recording, [values], 1.0)
    assert state[0] == pytest.approx(clip_reference(values, 1.0)[0], rel=1e-6)


@pytest.mark.parametrize(
    ("max_norm", "scale"), [(None, 1.0), (1.0, 1e-3), (0.5, 1.0), (1e-3, 1e-4), (1.0, 0.0)]
)
def test_factor(recording: Recording, max_norm: float | None, scale: float) -> None:
    slices = [s * np.float32(scale) for s in random_slices(np.random.default_rng(3), 300, 1)]
    state, total = run(recording, slices, max_norm)
    norm, factor = clip_reference(slices[0], max_norm)
    assert state == pytest.approx([norm, factor, 1.0, 0.0], rel=1e-6)
    np.testing.assert_array_equal(total, slices[0])  # the gradient itself is not scaled


@pytest.mark.parametrize(
    ("max_norm", "scale"), [(None, 1.0), (1.0, 1e-3), (0.5, 1.0), (1e-3, 1e-4), (1.0, 0.0)]
)
@pytest.mark.parametrize("n_slices", [1, 3])
def test_loss_scale(
    recording: Recording, max_norm: float | None, scale: float, n_slices: int
) -> None:
    slices = [s * np.float32(scale) for s in random_slices(np.random.default_rng(8), 300, n_slices)]
    plain, total = run(recording, slices, max_norm)
    # A power of two is exact: the same norm bit for bit, and the factor so many times smaller.
    scaled, scaled_total = run(recording, [1024 * s for s in slices], max_norm, loss_scale=1024.0)
    np.testing.assert_array_equal(scaled * [1, 1024, 1, 1], plain)
    np.testing.assert_array_equal(scaled_total, 1024 * total)
    # Another scale costs a rounding here and there.
    thrice, _ = run(recording, [np.float32(3) * s for s in slices], max_norm, loss_scale=3.0)
    assert thrice * [1, 3, 1, 1] == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize(("n_slices", "at"), [(1, 0), (2, 4999)])
def test_not_finite(
    recording: Recording, bad: float, max_norm: float | None, n_slices: int, at: int
) -> None:
    slices = random_slices(np.random.default_rng(5), 5000, n_slices)
    slices[-1][at] = bad
    state, _ = run(recording, slices, max_norm)
    assert state[2] == 0.0


def test_infinities_that_cancel_are_not_finite(recording: Recording) -> None:
    slices = random_slices(np.random.default_rng(6), 100, 2)
    slices[0][7], slices[1][7] = np.inf, -np.inf
    state, _ = run(recording, slices, 1.0)
    assert state[2] == 0.0


def test_same_bits_every_time(recording: Recording) -> None:
    slices = random_slices(np.random.default_rng(7), 50_000, 4)
    first, second = (run(recording, slices, 1.0, 20_000) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.tobytes() == b.tobytes()


def test_ranges_lie_on_bindings() -> None:
    for n, max_range in [(64, 64), (1000, 64), (1000, 130), (128, 1 << 25), (640, 10)]:
        ranges = flat_ranges(n, max_range)
        assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
        assert ranges[-1][1] == n
        assert all(start % 64 == 0 for start, _ in ranges)
        assert all(0 < stop - start <= max(64, max_range) for start, stop in ranges)


def test_split_ranges_are_dispatched_apart(recording: Recording) -> None:
    program = Program(recording)
    gradient_norm(
        program,
        [recording.memory.empty((padded(1000),))],
        recording.memory.empty((4,)),
        max_norm=1.0,
        max_range=256,
    )
    templates = [c.template for c in program.commands if isinstance(c, Dispatch)]
    assert templates == ["gradient_squares"] * 4 + ["gradient_norm"]


def test_what_is_refused(recording: Recording) -> None:
    gradient, state = recording.memory.empty((64,)), recording.memory.empty((4,))
    with pytest.raises(ValueError, match="5 slices"):
        gradient_norm(Program(recording), [gradient] * 5, state, max_norm=1.0)
    with pytest.raises(ValueError, match="gradient slice"):
        gradient_norm(
            Program(recording), [gradient, recording.memory.empty((128,))], state, max_norm=1.0
        )
    with pytest.raises(ValueError, match="no multiple of 4"):
        gradient_norm(Program(recording), [recording.memory.empty((63,))], state, max_norm=1.0)
    with pytest.raises(ValueError, match="max_norm of 0"):
        gradient_norm(Program(recording), [gradient], state, max_norm=0.0)
    for scale in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="loss_scale"):
            gradient_norm(Program(recording), [gradient], state, max_norm=1.0, loss_scale=scale)
