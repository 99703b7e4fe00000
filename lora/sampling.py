"""Which token comes next: the most likely one, or one drawn from the logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shaders.errors import InputError


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
        chances = probabilities(logits, text, self.sampling)
        # The inverse of the distribution function: one uniform number a token.
        edges = np.cumsum(chances)
        place = np.searchsorted(edges, self._random.random() * edges[-1], side="right")
        # Rounding can carry the number to the very end, past the last token that is left.
        return int(min(place, np.flatnonzero(chances)[-1]))


def probabilities(logits: np.ndarray, text: Sequence[int], sampling: Sampling) -> np.ndarray:
    """The distribution that the next token is drawn from, f64 [vocab_size], of sum 1.

    Args:
        logits: [vocab_size].
        text: the tokens so far.
        sampling: with a temperature above 0.
    """
    scores = _penalized(logits, text, sampling.repetition_penalty)
    scores = (scores - scores.max()) / sampling.temperature  # the difference first: no overflow
    chances = np.exp(scores)
    order = np.argsort(-scores, kind="stable")  # of equal ones the lowest id first
    kept = len(order) if sampling.top_k == 0 else min(sampling.top_k, len(order))
    chances[order[kept:]] = 0.0
    chances /= chances.sum()
    if sampling.top_p < 1:
        before = np.cumsum(chances[order]) - chances[order]  # what more likely tokens reach
        chances[order[before >= sampling.top_p]] = 0.0
    chances[chances < sampling.min_p * chances[order[0]]] = 0.0
    return chances / chances.sum()


def _penalized(logits: np.ndarray, text: Sequence[int], penalty: float) -> np.ndarray:
    """The logits in float64, lower for tokens that are in the text."""
    scores = logits.astype(np.float64)
    if penalty != 1:
        seen = np.unique(np.asarray(text, np.int64))
        seen = seen[seen < len(scores)]  # a tokenizer may know tokens that have no logit
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    return scores
