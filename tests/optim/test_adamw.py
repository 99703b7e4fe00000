"""AdamW against float64 numpy, and against torch."""

from __future__ import annotations

import numpy as np
import pytest

from lora.checks.references.optim import BETAS, EPSILON, AdamWReference, clip_reference
from lora.optim.adamw import AdamWSettings, AdamWTensors, adamw, step_words
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.recorded_optimizer import Optimizer, few_ranges, padded, random_slices

STEPS = 8


def learning_rate(t: int) -> float:
    """Changes from step to step, as a schedule's does; zero in the first."""
    return 1e-3 * (t - 1) / STEPS


def parameters_of(rng: np.random.Generator, n: int) -> np.ndarray:
    values = np.zeros(padded(n), np.float32)
    values[:n] = rng.normal(size=n)
    return values


@pytest.mark.parametrize("n", [1, 63, 64, 260, 100_003])
@pytest.mark.parametrize(
    ("n_slices", "max_norm", "weight_decay", "max_range"),
    [(1, None, 0.0, None), (4, 1.0, 0.1, None), (2, 0.3, 0.01, 1000)],
)
def test_eight_steps(
    recording: Recording,
    n: int,
    n_slices: int,
    max_norm: float | None,
    weight_decay: float,
    max_range: int | None,
) -> None:
    rng = np.random.default_rng(n)
    start = parameters_of(rng, n)
    optimizer = Optimizer.record(
        recording,
        start,
        n_slices,
        max_norm=max_norm,
        weight_decay=weight_decay,
        max_range=few_ranges(n, max_range),
    )
    reference = AdamWReference(start, weight_decay)
    for t in range(1, STEPS + 1):
        slices = random_slices(rng, n, n_slices)
        optimizer.step(slices, learning_rate(t), t)
        gradient = np.stack(slices).sum(axis=0, dtype=np.float64)
        reference.step(gradient * clip_reference(gradient, max_norm)[1], learning_rate(t))
    p, m, v = optimizer.read()
    # Some ten roundings of 2^-24 a step. m is a sum of both signs, and the slices' sum cancels:
    # an error relative to the sizes of the terms, which are below 5 (times the clip factor).
    factor = 1.0 if max_norm is None else min(1.0, max_norm / np.sqrt(n))
    np.testing.assert_allclose(m, reference.m, rtol=2e-6, atol=5e-6 * factor)
    np.testing.assert_allclose(v, reference.v, rtol=2e-5, atol=1e-6 * factor**2)
    # A step moves a parameter by at most a few learning rates, each to about 1e-5 of itself.
    np.testing.assert_allclose(p, reference.p, rtol=1e-6, atol=2e-8)
    assert not p[n:].any() and not m[n:].any() and not v[n:].any()  # padding stays exactly zero


@pytest.mark.parametrize("max_norm", [None, 0.3])
@pytest.mark.parametrize(("n_slices", "max_range"), [(1, None), (4, None), (2, 512)])
def test_a_scaled_loss_trains_the_same_bits(
    recording: Recording, max_norm: float | None, n_slices: int, max_range: int | None
) -> None:
    """A power of two only moves exponents, as long as nothing over- or underflows."""
    results = []
    for loss_scale in (1.0, 1024.0):
        rng = np.random.default_rng(3)
        start = parameters_of(rng, 1900)
        optimizer = Optimizer.record(
            recording,
            start,
            n_slices,
            max_norm=max_norm,
            loss_scale=loss_scale,
            weight_decay=0.1,
            max_range=max_range,
        )
        norms = []
        for t in range(1, 5):
            slices = [np.float32(loss_scale) * s for s in random_slices(rng, 1900, n_slices)]
            optimizer.step(slices, 1e-3, t)
            norms.append(recording.memory.read(optimizer.state)[0])
        assert (optimizer.read()[0] != start).any()
        results.append([np.array(norms).tobytes(), *(v.tobytes() for v in optimizer.read())])
    assert results[0] == results[1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(recording: Recording, bad: float) -> None:
    rng = np.random.default_rng(1)
    start = parameters_of(rng, 700)
    optimizer = Optimizer.record(recording, start, 2, max_norm=1.0, weight_decay=0.1, max_range=256)
    optimizer.step(random_slices(rng, 700, 2), 1e-3, 1)
    before = optimizer.read()
    slices = random_slices(rng, 700, 2)
    slices[1][650] = bad
    optimizer.step(slices, 1e-3, 2)
    assert recording.memory.read(optimizer.state)[2] == 0.0
    for a, b in zip(before, optimizer.read(), strict=True):
        assert a.tobytes() == b.tobytes()
    optimizer.step(random_slices(rng, 700, 2), 1e-3, 3)  # and the next step goes on
    assert recording.memory.read(optimizer.state)[2] == 1.0
    assert (optimizer.read()[0][:700] != before[0][:700]).any()
    assert all(np.isfinite(values).all() for values in optimizer.read())


def test_same_bits_every_time(recording: Recording) -> None:
    results = []
    for max_range in (None, 2048, 2048):
        rng = np.random.default_rng(2)
        start = parameters_of(rng, 5000)
        optimizer = Optimizer.record(recording, start, 4, weight_decay=0.1, max_range=max_range)
        for t in range(1, 4):
            optimizer.step(random_slices(rng, 5000, 4), 1e-3, t)
        results.append([values.tobytes() for values in optimizer.read()])
    # Without clipping the norm plays no part: even the split gives the same bits.
    assert results[0] == results[1] == results[2]


def test_step_words() -> None:
    words = step_words(2e-4, 3, BETAS)
    assert words.dtype == np.uint32
    expected = np.array([2e-4, 1 - 0.9**3, 1 - 0.999**3, 0], np.float32)
    np.testing.assert_array_equal(words.view(np.float32), expected)
    with pytest.raises(ValueError, match="counted from 1"):
        step_words(2e-4, 0, BETAS)


def test_what_is_refused(recording: Recording) -> None:
    def record(n: int, n_gradient: int, epsilon: float) -> None:
        p, m, v = (recording.memory.empty((n,)) for _ in range(3))
        gradient, state, step = (
            recording.memory.empty((n_gradient,)),
            recording.memory.empty((4,)),
            recording.memory.uniform(),
        )
        adamw(
            Program(recording), AdamWTensors(p, gradient, m, v), state, step,
            AdamWSettings(BETAS, epsilon, weight_decay=0.0),
        )  # fmt: skip

    record(64, 64, 1e-8)
    with pytest.raises(ValueError, match="expected"):
        record(64, 128, 1e-8)
    with pytest.raises(ValueError, match="multiple of 4"):
        record(63, 63, 1e-8)
    with pytest.raises(ValueError, match="epsilon"):
        record(64, 64, 1e-50)


@pytest.mark.parity
@pytest.mark.parametrize(("max_norm", "weight_decay"), [(None, 0.0), (1.0, 0.1)])
def test_as_torch(recording: Recording, max_norm: float | None, weight_decay: float) -> None:
    torch = pytest.importorskip("torch")
    n = 1280
    rng = np.random.default_rng(4)
    start = parameters_of(rng, n)
    optimizer = Optimizer.record(recording, start, 1, max_norm=max_norm, weight_decay=weight_decay)
    p = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.AdamW([p], betas=BETAS, eps=EPSILON, weight_decay=weight_decay)
    for t in range(1, STEPS + 1):
        slices = random_slices(rng, n, 1)
        optimizer.step(slices, learning_rate(t), t)
        p.grad = torch.tensor(slices[0])
        if max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_([p], max_norm)
            assert recording.memory.read(optimizer.state)[0] == pytest.approx(float(norm), rel=2e-6)
        theirs.param_groups[0]["lr"] = learning_rate(t)
        theirs.step()
    # Both in f32: a few roundings a step on either side.
    np.testing.assert_allclose(optimizer.read()[0], p.detach().numpy(), rtol=1e-6, atol=2e-8)


@pytest.mark.parametrize("rate", [1e20, 1e30, 3e38, 1e300])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_no_rate_makes_a_parameter_infinite(
    recording: Recording, rate: float, weight_decay: float
) -> None:
    """The steps go as far as f32 does, and in the gradient's direction."""
    rng = np.random.default_rng(7)
    start = parameters_of(rng, 64)
    start[:8] = 0.0
    optimizer = Optimizer.record(
        recording, start, 1, max_norm=None, weight_decay=weight_decay, max_range=None
    )
    gradient = np.where(np.arange(start.size) % 2, 1e15, -1e-3).astype(np.float32)
    for t in range(1, 4):
        optimizer.step([gradient], rate, t)
        p, m, v = optimizer.read()
        assert np.isfinite(p).all() and np.isfinite(m).all() and np.isfinite(v).all()
        if not weight_decay:
            assert (np.sign(p) == -np.sign(gradient)).all() and abs(p).min() > 1e19
