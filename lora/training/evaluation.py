"""What an evaluation comes to, out of the losses and hits that the device gives batch by batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lora.data.batches import Batch
from lora.data.examples import Example
from lora.training.metrics import EvalResult


class Tally:
    """Adds up batches in their order.

    Args:
        examples: all that are evaluated, in the order of the batches.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples
        self._loss_sum = 0.0
        self._n_tokens = 0
        self._n_correct = 0
        self._all_correct: list[bool] = []  # of each example

    def add(self, batch: Batch, losses: np.ndarray, correct: np.ndarray) -> None:
        """Counts a batch.

        Args:
            losses: f32 [at least batch.n_trained], of its targets in order.
            correct: the same; 1 where the target is the argmax.
        """
        n = batch.n_trained
        hits = correct[:n] == 1.0
        self._loss_sum += float(losses[:n].astype(np.float64).sum())
        self._n_tokens += n
        self._n_correct += int(hits.sum())
        owner = batch.segment_start[batch.targets >= 0]
        self._all_correct += [bool(hits[owner == start].all()) for start in batch.example_starts]

    def result(self) -> EvalResult:
        """Of all batches."""
        n_exact = sum(
            right and not example.cut
            for right, example in zip(self._all_correct, self._examples, strict=True)
        )
        loss = self._loss_sum / max(1, self._n_tokens)
        return EvalResult(
            loss=loss,
            perplexity=math.exp(min(loss, 700.0)),
            token_accuracy=self._n_correct / max(1, self._n_tokens),
            exact_match=n_exact / len(self._examples),
            n_exact=n_exact,
            n_examples=len(self._examples),
            n_tokens=self._n_tokens,
            n_cut=sum(example.cut for example in self._examples),
        )
