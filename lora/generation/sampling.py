"""Which token comes next: the most likely one, or one drawn from the logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora.shaders.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    The steps come in the order of transformers' logits processors: repetition penalty, temperature,
    top-k, top-p, min-p. Each works on what the one before it left.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token (greedy), which leaves
            nothing to top_k, top_p and min_p.
        top_k: so many of the most likely tokens stay; 0 for all.
        top_p: the fewest most likely tokens stay whose probabilities reach it together; 1 for all.
        min_p: tokens stay that have at least this share of the most likely one's probability.
        repetition_penalty: logits of tokens that are in the text already are divided by it where
            they are positive and multiplied by it where they are negative (Keskar et al. 2019).
        seed: of the draws; None for another one each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        for name, fits, wanted in (
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or above"),
            ("top_k", self.top_k >= 0, "0 (all) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0, up to 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("seed", self.seed is None or self.seed >= 0, "0 or above"),
        ):
            if not fits:
                raise InputError(f"{name} is {getattr(self, name)}; it must be {wanted}.")

    @property
    def only_argmax(self) -> bool:
        """Whether the most likely token is all that is asked for: no logits need be read."""
        return self.temperature == 0 and self.repetition_penalty == 1


GREEDY = Sampling()

# So many of the most likely tokens are sorted first where top_p cuts; then eight times as many.
_FIRST_SORTED = 256


class Sampler:
    """Draws tokens; one seed gives one series of draws."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: np.ndarray, text: Sequence[int]) -> int:
        """The next token.

        Args:
            logits: [vocab_size].
            text: the tokens so far, prompt included.
        """
        if self.sampling.temperature == 0:
            return int(np.argmax(_penalized(logits, text, self.sampling.repetition_penalty)))
        ids, chances = candidates(logits, text, self.sampling)
        # The inverse of the distribution function: one uniform number a token.
        edges = np.cumsum(chances, out=chances)
        place = np.searchsorted(edges, self._random.random() * edges[-1], side="right")
        return int(ids[min(place, len(ids) - 1)])  # rounding can carry the number to the very end


def candidates(
    logits: np.ndarray, text: Sequence[int], sampling: Sampling
) -> tuple[np.ndarray, np.ndarray]:
    """What the next token is drawn from: ids, lowest first, and chances above 0, f64, of sum 1.

    A vocabulary is never sorted as a whole where a few of its tokens will do: that took longer than
    a GPU takes for the token.

    Args:
        logits: [vocab_size].
        text: the tokens so far.
        sampling: with a temperature above 0.
    """
    scores = _penalized(logits, text, sampling.repetition_penalty)
    scores -= scores.max()  # before the division: no overflow
    scores /= sampling.temperature
    ids = None  # all
    if 0 < sampling.top_k < len(scores):
        ids = np.sort(_highest(scores, sampling.top_k))
        scores = scores[ids]
    chances = np.exp(scores)
    chances /= chances.sum()
    if sampling.top_p < 1:
        kept = _fewest_that_reach(scores, chances, sampling.top_p)
        ids, chances = kept if ids is None else ids[kept], chances[kept]
    least = max(sampling.min_p * chances.max(), np.finfo(np.float64).tiny)
    likely = np.flatnonzero(chances >= least)
    ids, chances = likely if ids is None else ids[likely], chances[likely]
    chances /= chances.sum()
    return ids, chances


def _highest(scores: np.ndarray, n: int) -> np.ndarray:
    """The places of the n highest scores, highest first; of equal ones the first place first."""
    if n >= len(scores):
        places = np.arange(len(scores))
    else:
        places = np.flatnonzero(scores >= np.partition(scores, -n)[-n])  # more, where some equal it
    return places[np.argsort(-scores[places], kind="stable")[:n]]


def _fewest_that_reach(scores: np.ndarray, chances: np.ndarray, top_p: float) -> np.ndarray:
    """The places, ascending, of the fewest highest scores whose chances reach top_p together."""
    n = _FIRST_SORTED
    while True:
        order = _highest(scores, n)
        before = np.cumsum(chances[order]) - chances[order]  # what more likely tokens reach
        if n >= len(scores) or before[-1] >= top_p:
            return np.sort(order[before < top_p])
        n *= 8


def _penalized(logits: np.ndarray, text: Sequence[int], penalty: float) -> np.ndarray:
    """The logits in float64, lower for tokens that are in the text."""
    scores = logits.astype(np.float64)
    if penalty != 1:
        seen = np.asarray(text, np.int64)
        seen = seen[seen < len(scores)]  # a tokenizer may know tokens that have no logit
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    return scores
