"""Lion and AdamW of 8 bits against numpy in float64, and against bitsandbytes; rates of parts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lora.checks.references.optim import BETAS, EPSILON, AdamWReference
from lora.checks.references.other_optimizers import AdamW8Reference, LionReference
from lora.optim.adamw import AdamWSettings, AdamWTensors, adamw, step_words
from lora.optim.adamw_8bit import Moments8, adamw_8bit, dynamic_codes
from lora.optim.lion import LionTensors, lion
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor
from tests.support.kernels import with_facts

RATE, DECAY, STEPS, RATIO = 1e-2, 0.1, 5, 16.0


def values_of(n: int, seed: int, decades: int = 5) -> np.ndarray:
    """Sizes of several decades, as gradients have them, and zeros."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=n) * 10.0 ** rng.uniform(-decades, 0, n)
    values[::97] = 0.0
    return values.astype(np.float32)


def rates_of(n: int) -> np.ndarray:
    """Of each 64 elements: every third has another."""
    return np.where(np.arange(-(-n // 64)) % 3 == 1, RATIO, 1.0).astype(np.float32)


def state_of(recording: Recording, factor: float, counts: bool = True) -> Tensor:
    return recording.memory.upload(np.array([1.0, factor, float(counts), 0.0], np.float32))


@pytest.mark.parametrize(("n", "max_range"), [(64, None), (8256, None), (8256, 4096)])
@pytest.mark.parametrize("with_rates", [False, True])
def test_lion(recording: Recording, n: int, max_range: int | None, with_rates: bool) -> None:
    start, memory = values_of(n, 0), recording.memory
    p, g, m = (memory.upload(x) for x in (start, *np.zeros((2, n), np.float32)))
    rates = rates_of(n) if with_rates else np.ones(-(-n // 64), np.float32)
    words, program = memory.uniform(), Program(recording)
    tensors = LionTensors(p, g, m, memory.upload(rates) if with_rates else None)
    lion(program, tensors, state_of(recording, 0.5), words, BETAS, DECAY, max_range=max_range)
    reference, each, clear = LionReference(start, DECAY), np.repeat(rates, 64)[:n], np.full(n, True)
    for t in range(1, STEPS + 1):
        gradient = values_of(n, t)
        memory.write(g, gradient)
        memory.write(words, step_words(RATE, t, BETAS))
        program.run()
        update = reference.step(gradient * 0.5, RATE * each)
        clear &= (np.abs(update) > 1e-6 * np.abs(update).max()) | (update == 0)
    assert clear.mean() > 0.9  # the others' signs are a matter of rounding
    found = memory.read(p)
    np.testing.assert_allclose(found[clear], reference.p[clear], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(memory.read(m), reference.m, rtol=1e-5, atol=1e-8)
    always = np.zeros(n, bool)
    always[::97] = True  # no gradient: decayed alone
    shrunk = start * np.prod([1 - RATE * each * DECAY] * STEPS, axis=0)
    np.testing.assert_allclose(found[always], shrunk[always], rtol=1e-5)


def record_8bit(
    recording: Recording, start: np.ndarray, rates: np.ndarray | None, max_range: int | None
) -> tuple[Tensor, Moments8, Tensor, Callable[[np.ndarray, int], None]]:
    n, memory = start.size, recording.memory
    p, g = memory.upload(start), memory.upload(np.zeros(n, np.float32))
    moments, words, program = Moments8.allocate(recording, n), memory.uniform(), Program(recording)
    state = state_of(recording, 1.0)
    adamw_8bit(
        program, p, g, moments, (state, words), AdamWSettings(BETAS, EPSILON, DECAY),
        rates=None if rates is None else memory.upload(rates), max_range=max_range,
    )  # fmt: skip

    def step(gradient: np.ndarray, t: int) -> None:
        memory.write(g, gradient)
        memory.write(words, step_words(RATE, t, BETAS))
        program.run()

    return p, moments, state, step


@pytest.mark.parametrize(("n", "max_range"), [(64, None), (16704, None), (16704, 8192)])
@pytest.mark.parametrize(("with_rates", "is_cpu"), [(False, True), (True, False), (False, False)])
def test_adamw_8bit(
    recording: Recording, n: int, max_range: int | None, with_rates: bool, is_cpu: bool
) -> None:
    recording = with_facts(recording, is_cpu=is_cpu)
    start, memory = values_of(n, 0), recording.memory
    rates = rates_of(n) if with_rates else None
    p, moments, state, step = record_8bit(recording, start, rates, max_range)
    each = np.ones(n) if rates is None else np.repeat(rates, 64)[:n].astype(np.float64)
    reference = AdamW8Reference(start, DECAY)
    for t in range(1, STEPS + 1):
        gradient = values_of(n, t)
        step(gradient, t)
        reference.step(gradient, RATE * each)
        codes = [
            memory.read(words).view(np.uint8).astype(int)
            for words in (moments.first, moments.second)
        ]
        # Halfway between two codes rounding decides: one in some thousands is another.
        for found, expected in zip(codes, reference.codes, strict=True):
            assert np.abs(found - expected).max() <= 1
            assert (found != expected).mean() < 2e-3
        scales = memory.read(moments.scales)
        np.testing.assert_allclose(scales.T, reference.scales, rtol=1e-5)
        reference.codes = codes
    found = memory.read(p)
    moved = np.abs(found - start).max()
    assert np.abs(found - reference.p).max() < 2e-2 * moved  # where a code was another
    assert np.median(np.abs(found - reference.p)) < 1e-6 * moved
    before = [memory.read(t) for t in (p, moments.first, moments.second, moments.scales)]
    memory.write(state, np.array([1.0, 1.0, 0.0, 0.0], np.float32))  # a step that doesn't count
    step(values_of(n, 99), STEPS + 1)
    after = [memory.read(t) for t in (p, moments.first, moments.second, moments.scales)]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(before, after, strict=True))


def test_blocks_by_one_or_by_four_are_the_same(recording: Recording) -> None:
    """A GPU's workgroups have four, and the last one not all of them."""
    start, found = values_of(16704, 0), []
    for is_cpu in (True, False):
        of = with_facts(recording, is_cpu=is_cpu)
        p, moments, _, step = record_8bit(of, start, None, None)
        for t in range(1, STEPS + 1):
            step(values_of(start.size, t), t)
        written = (p, moments.first, moments.second, moments.scales)
        found.append([of.memory.read(tensor).tobytes() for tensor in written])
    assert found[0] == found[1]


def test_moments_of_8_bits_take_a_quarter(recording: Recording) -> None:
    n = 1 << 16
    moments = Moments8.allocate(recording, n)
    taken = sum(t.n_bytes for t in (moments.first, moments.second, moments.scales, moments.codes))
    assert taken <= 0.27 * 8 * n


def test_padding_stays_zero(recording: Recording) -> None:
    start = np.zeros(256, np.float32)
    p, moments, _, step = record_8bit(recording, start, None, None)
    gradient = np.zeros(256, np.float32)
    gradient[:100] = 1.0
    for t in range(1, 4):
        step(gradient, t)
    found = recording.memory.read(p)
    assert (found[100:] == 0).all() and (found[:100] < 0).all()


@pytest.mark.parametrize("max_range", [None, 4096])
def test_adamw_with_rates(recording: Recording, max_range: int | None) -> None:
    n, memory = 8256, recording.memory
    start, rates = values_of(n, 0), rates_of(n)
    p, g, m, v = (memory.upload(x) for x in (start, *np.zeros((3, n), np.float32)))
    words, program = memory.uniform(), Program(recording)
    tensors = AdamWTensors(p, g, m, v, memory.upload(rates))
    settings = AdamWSettings(BETAS, EPSILON, DECAY)
    adamw(program, tensors, state_of(recording, 1.0), words, settings, max_range=max_range)
    references = {rate: AdamWReference(start, DECAY) for rate in (1.0, RATIO)}
    for t in range(1, STEPS + 1):
        gradient = values_of(n, t)
        memory.write(g, gradient)
        memory.write(words, step_words(RATE, t, BETAS))
        program.run()
        for rate, reference in references.items():
            reference.step(gradient, RATE * rate)
    each = np.repeat(rates, 64)[:n]
    expected = np.where(each == RATIO, references[RATIO].p, references[1.0].p)
    np.testing.assert_allclose(memory.read(p), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parity
def test_against_bitsandbytes(recording: Recording) -> None:
    torch, bnb = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes")
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        own = functional.create_dynamic_map(signed=signed).numpy()
        np.testing.assert_allclose(dynamic_codes(signed=signed), own, rtol=1e-6, atol=1e-12)
    n = 8192
    start, memory = values_of(n, 0), recording.memory
    p, moments, _, step = record_8bit(recording, start, None, None)
    q = memory.upload(start)
    q_g, q_m = (memory.upload(np.zeros(n, np.float32)) for _ in range(2))
    words, program = memory.uniform(), Program(recording)
    lion(
        program, LionTensors(q, q_g, q_m), state_of(recording, 1.0), words, BETAS, DECAY
    )  # fmt: skip
    theirs = [torch.nn.Parameter(torch.from_numpy(start.copy())) for _ in range(2)]
    judges = [
        bnb.optim.AdamW8bit([theirs[0]], lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY),
        bnb.optim.Lion([theirs[1]], lr=RATE, betas=BETAS, weight_decay=DECAY),
    ]
    for t in range(1, STEPS + 1):
        gradient = values_of(n, t, decades=1)
        gradient[gradient == 0] = 0.1
        for parameter, judge in zip(theirs, judges, strict=True):
            parameter.grad = torch.from_numpy(gradient.copy())
            judge.step()
        step(gradient, t)
        memory.write(q_g, gradient)
        memory.write(words, step_words(RATE, t, BETAS))
        program.run()
    for found, parameter in zip((memory.read(p), memory.read(q)), theirs, strict=True):
        other = parameter.detach().numpy()
        moved = np.linalg.norm(other - start)
        assert np.linalg.norm(found - other) < 0.02 * moved
        assert np.median(np.abs(found - other)) < 1e-5
