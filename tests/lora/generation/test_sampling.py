"""Sampling: properties of the distributions, agreement with transformers, draws that repeat."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.generation import sampling as sampling_module
from lora.generation.sampling import Sampler, Sampling, candidates
from lora.shaders.errors import InputError

# No subnormals: llvmpipe leaves its threads flushing them to zero, numpy's comparisons included.
_LOGIT = st.floats(-30, 30, width=32, allow_subnormal=False)
LOGITS = st.lists(_LOGIT, min_size=1, max_size=40).map(lambda values: np.array(values, np.float32))
TEXTS = st.lists(st.integers(0, 60), max_size=10)  # ids past the logits, too: padding tokens
SETTINGS = st.builds(
    Sampling,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.5, 2),
)


def probabilities(logits: np.ndarray, text: list[int], sampling: Sampling) -> np.ndarray:
    """What is drawn from, over the whole vocabulary."""
    ids, chances = candidates(logits, text, sampling)
    whole = np.zeros(len(logits))
    whole[ids] = chances
    return whole


def plain_choice(
    logits: np.ndarray, text: list[int], sampling: Sampling, random: np.random.Generator
) -> int:
    """A draw as its definition says it: the whole vocabulary sorted, every step on all of it."""
    scores = logits.astype(np.float64)
    for token in {token for token in text if token < len(scores)}:
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    scores = (scores - scores.max()) / sampling.temperature
    chances = np.exp(scores)
    order = np.argsort(-scores, kind="stable")  # of equal ones the lowest id first
    chances[order[sampling.top_k or len(order) :]] = 0.0
    chances /= chances.sum()
    if sampling.top_p < 1:
        before = np.cumsum(chances[order]) - chances[order]
        chances[order[before >= sampling.top_p]] = 0.0
    chances[chances < sampling.min_p * chances.max()] = 0.0
    edges = np.cumsum(chances / chances.sum())
    place = np.searchsorted(edges, random.random() * edges[-1], side="right")
    return int(min(place, np.flatnonzero(chances)[-1]))


@pytest.mark.parametrize("first_sorted", [1, sampling_module._FIRST_SORTED])
@pytest.mark.parametrize("ties", [False, True])
def test_the_same_draws_as_by_the_definition(
    monkeypatch: pytest.MonkeyPatch, first_sorted: int, ties: bool
) -> None:
    """Without sorting a vocabulary, equal logits and several rounds of top_p included.

    On fixed seeds: the sums are the definition's but for rounding, so that one draw in some 1e12
    may differ.
    """
    monkeypatch.setattr(sampling_module, "_FIRST_SORTED", first_sorted)
    rng = np.random.default_rng(0)
    for seed in range(600):
        size = int(rng.choice([1, 5, 60, 3000]))
        logits = rng.normal(0, rng.choice([0.01, 1, 6]), size).astype(np.float32)
        if ties:
            logits = np.round(logits)
        text = rng.integers(0, size + 5, 8).tolist()
        settings_ = Sampling(
            temperature=float(rng.choice([0.02, 0.7, 3])),
            top_k=int(rng.choice([0, 1, 3, 40, 4000])),
            top_p=float(rng.choice([1, 0.3, 0.95, 0.9999])),
            min_p=float(rng.choice([0, 0.05, 1])),
            repetition_penalty=float(rng.choice([1, 1.1])),
            seed=seed,
        )
        sampler, random = Sampler(settings_), np.random.default_rng(seed)
        for _ in range(3):
            assert sampler.choose(logits, text) == plain_choice(logits, text, settings_, random)


@pytest.mark.parametrize(
    ("options", "longest"),
    [
        ({"temperature": 0, "repetition_penalty": 1.2}, 0),
        ({"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.05}, 40),
        ({"temperature": 0.7, "min_p": 0.05}, 0),
        ({"temperature": 0.7, "top_p": 0.95}, 256),
    ],
)
def test_a_whole_vocabulary_is_never_sorted(
    monkeypatch: pytest.MonkeyPatch, options: dict, longest: int
) -> None:
    """Of peaked logits, as models give them: so many are sorted at most."""
    logits = np.random.default_rng(0).normal(0, 1, 50_000).astype(np.float32)
    logits[1234:1240] += 20
    sorted_, argsort, sort = [0], np.argsort, np.sort

    def noting(function):
        def noted(values, *args, **kwargs):
            sorted_.append(len(values))
            return function(values, *args, **kwargs)

        return noted

    monkeypatch.setattr(np, "argsort", noting(argsort))
    monkeypatch.setattr(np, "sort", noting(sort))
    monkeypatch.setattr(np, "unique", noting(np.unique))
    token = Sampler(Sampling(**options, seed=0)).choose(logits, list(range(1000)))
    assert token in range(1234, 1240)
    assert max(sorted_) == longest


@given(LOGITS, TEXTS, SETTINGS)
def test_distributions(logits: np.ndarray, text: list[int], sampling: Sampling) -> None:
    """Every setting leaves a distribution, over no more tokens than it allows."""
    chances = probabilities(logits, text, sampling)
    assert chances.shape == logits.shape
    assert (chances >= 0).all() and math.isclose(chances.sum(), 1.0)
    kept = np.flatnonzero(chances)
    assert 1 <= len(kept) <= (sampling.top_k or len(logits))
    # Dividing by the sum rounds: f64, so 1e-12 covers it.
    assert chances[kept].min() >= sampling.min_p * chances.max() * (1 - 1e-12)


@given(LOGITS, st.floats(0.05, 5), st.floats(0.01, 0.999))
def test_top_p_keeps_the_fewest_that_reach_it(
    logits: np.ndarray, temperature: float, top_p: float
) -> None:
    everything = probabilities(logits, [], Sampling(temperature=temperature))
    chances = probabilities(logits, [], Sampling(temperature=temperature, top_p=top_p))
    kept = everything[chances > 0]
    assert kept.sum() >= top_p - 1e-9
    assert kept.sum() - kept.min() < top_p + 1e-9
    assert kept.min() >= everything[chances == 0].max(initial=0.0)
    np.testing.assert_allclose(chances[chances > 0], kept / kept.sum())


@given(LOGITS, st.integers(1, 40))
def test_top_k_keeps_the_most_likely(logits: np.ndarray, top_k: int) -> None:
    chances = probabilities(logits, [], Sampling(temperature=1, top_k=top_k))
    # Chances of e^-60 are above 0 in f64: nothing else is zero.
    assert (chances > 0).sum() == min(top_k, len(logits))
    assert logits[chances > 0].min() >= logits[chances == 0].max(initial=-np.inf)


@given(LOGITS, TEXTS, SETTINGS)
@settings(deadline=None)
def test_agrees_with_transformers(logits: np.ndarray, text: list[int], sampling: Sampling) -> None:
    """The same steps in the same order, where no two logits are equal (they keep all of those)."""
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    values = np.unique(logits)
    values = values[np.concatenate([[True], np.diff(values) > 1e-3])]
    np.random.default_rng(len(values)).shuffle(values)
    ids = torch.tensor([[token for token in text if token < len(values)]], dtype=torch.long)
    scores = torch.tensor(values[None].astype(np.float64))
    steps = [process.TemperatureLogitsWarper(sampling.temperature)]
    if ids.numel():
        steps.insert(0, process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.top_k:
        steps.append(process.TopKLogitsWarper(sampling.top_k))
    steps.append(process.TopPLogitsWarper(sampling.top_p))
    steps.append(process.MinPLogitsWarper(sampling.min_p))
    for step in steps:
        scores = step(ids, scores)
    theirs = torch.softmax(scores, dim=-1)[0].numpy()
    ours = probabilities(values, text, sampling)
    if ((theirs > 0) == (ours > 0)).all():
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
        return
    # They sum from the least likely up, we from the most likely down: a token may fall on the other
    # side where a sum, or a share, is the threshold but for rounding.
    everything = probabilities(
        values, text,
        Sampling(
            temperature=sampling.temperature, top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
        ),
    )  # fmt: skip
    order = np.argsort(-everything, kind="stable")
    sums, shares = np.cumsum(everything[order]), everything[order] / everything.max()
    assert min(abs(sums - sampling.top_p).min(), abs(shares - sampling.min_p).min()) < 1e-9


@given(LOGITS, TEXTS, SETTINGS, st.integers(0, 2**32))
def test_a_seed_gives_one_series_of_draws(
    logits: np.ndarray, text: list[int], sampling: Sampling, seed: int
) -> None:
    seeded = Sampling(**vars(sampling) | {"seed": seed})
    series = []
    for _ in range(2):
        sampler = Sampler(seeded)
        series.append([sampler.choose(logits, text) for _ in range(5)])
    assert series[0] == series[1]
    assert (probabilities(logits, text, seeded)[series[0]] > 0).all()


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Sampling(temperature=1, seed=0))
    n = 20_000
    counts = np.bincount([sampler.choose(logits, []) for _ in range(n)], minlength=4)
    # Four standard deviations of a binomial count at most; the seed is fixed.
    expected = n * np.exp(logits.astype(np.float64))
    assert (abs(counts - expected) < 4 * np.sqrt(expected)).all()


@given(LOGITS)
def test_greedy_takes_the_first_of_the_largest(logits: np.ndarray) -> None:
    assert Sampler(Sampling()).choose(logits, []) == logits.argmax()


def test_the_penalty_lowers_what_was_said() -> None:
    logits = np.array([2.0, 1.9, -1.0, -1.1], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=1.5))
    assert not sampler.sampling.only_argmax
    assert sampler.choose(logits, [0, 0, 99]) == 1
    assert sampler.choose(logits, [0, 1]) == 0
    # A negative logit becomes smaller too.
    chances = probabilities(logits, [2], Sampling(temperature=1, repetition_penalty=1.5))
    assert chances[2] < chances[3]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1; it must be 0"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 2.0}, "min_p is 2.0; it must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be above 0"),
        ({"seed": -3}, "seed is -3"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(settings_: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**settings_)
