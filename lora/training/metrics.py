"""What a step and an evaluation come to, and how the numbers come back from the device."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lora.optim.guard import STATE_AT
from lora.training.exchange import StepOfRanks


def as_json(value: Any) -> Any:
    """The value; None for a number that is not finite, which JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Metrics:
    """What one optimizer step was: a line of metrics.jsonl."""

    step: int  # counted from 1
    epoch: float  # passes over the data, this step included
    loss: float  # mean over the trained tokens
    grad_norm: float  # before clipping
    learning_rate: float
    tokens: int
    trained_tokens: int
    tokens_per_second: float
    seconds: float
    skipped: bool = False  # its loss or gradient was not finite: the adapter stayed as it was
    ranks: StepOfRanks | None = None  # how the processes fared, where there are several
    in_a_row: int = 0  # steps skipped, this one included, that no smaller loss scale helps
    retried: int = 0  # tries before this one, whose loss scale was too large for f16

    def as_dict(self) -> dict[str, Any]:
        """The fields by name as JSON can hold them: a number that is none is None.

        `skipped` and `retried` are there where it is so; in place of `ranks`, where there are
        several, `slowest_rank` and `communication`.
        """
        fields = {key: as_json(value) for key, value in vars(self).items()}
        for key in ("skipped", "retried"):
            if not fields[key]:
                del fields[key]
        del fields["ranks"], fields["in_a_row"]
        if self.ranks is not None:
            fields["slowest_rank"] = self.ranks.slowest
            fields["communication"] = round(self.ranks.communication, 4)
        return fields


@dataclass(frozen=True)
class EvalResult:
    """How a model does on examples, each token predicted from those before it."""

    loss: float  # mean over the trained tokens
    perplexity: float
    token_accuracy: float  # share of trained tokens that are the argmax
    exact_match: float  # share of examples that are exact
    n_exact: int  # examples that are not cut and whose every trained token is the argmax
    n_examples: int
    n_tokens: int  # trained ones
    n_cut: int  # examples whose answers data.max_length cut: never exact
    seconds: float = field(default=0.0, compare=False)  # that the evaluation took
    # Of each named set of data.eval; the figures above are then of all together.
    sets: Mapping[str, EvalResult] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them, those of sets by their names; without `seconds`."""
        fields: dict[str, Any] = {
            key: as_json(value)
            for key, value in vars(self).items()
            if key not in ("seconds", "sets")
        }
        if self.sets:
            fields["sets"] = {name: one.as_dict() for name, one in self.sets.items()}
        return fields

    def metrics(self) -> dict[str, float]:
        """By the names that metrics.jsonl and `train.best` know: eval_loss, eval_NAME_loss, …"""
        found: dict[str, float] = {}
        for prefix, result in (("eval_", self), *((f"eval_{n}_", r) for n, r in self.sets.items())):
            found |= {
                f"{prefix}loss": result.loss,
                f"{prefix}perplexity": result.perplexity,
                f"{prefix}accuracy": result.token_accuracy,
                f"{prefix}exact_match": result.exact_match,
            }
        return found


@dataclass(frozen=True)
class Sample:
    """What the model answered to one of train.sample_prompts."""

    prompt: str | list[dict[str, Any]]  # as the config has it
    text: str  # without the prompt


@dataclass(frozen=True)
class MetricsAtArrival:
    """Makes Metrics of a step once its numbers come back from the device."""

    step: int
    epoch: float
    learning_rate: float
    tokens: int
    trained_tokens: int
    ranks: StepOfRanks | None = None
    retried: int = 0

    def __call__(self, values: np.ndarray) -> Metrics:
        """The metrics; `values` is `Activations.metrics`: the loss first, then the step's state."""
        return Metrics(
            step=self.step,
            epoch=self.epoch,
            loss=float(values[0]) / self.trained_tokens,
            grad_norm=float(values[STATE_AT]),
            learning_rate=self.learning_rate,
            tokens=self.tokens,
            trained_tokens=self.trained_tokens,
            tokens_per_second=0.0,
            seconds=0.0,
            skipped=bool(values[STATE_AT + 2] == 0.0),
            ranks=self.ranks,
            in_a_row=int(values[STATE_AT + 6]),
            retried=self.retried,
        )


class StepClock:
    """Seconds between the arrivals of steps.

    What the caller does between two of them is not counted. Steps that the device ended
    meanwhile count as long as those before them: that they took less can't be known.
    """

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._away = 0.0  # since then
        self._usual = 0.0  # seconds of a step, of those that nothing came between

    def left(self, seconds: float) -> None:
        """The caller took so long."""
        self._away += seconds

    def timed(self, arrived: Sequence[Metrics]) -> list[Metrics]:
        """The same metrics with the time since the last arrival, shared equally."""
        if not arrived:
            return []
        now = time.perf_counter()
        whole = max(now - self._last, 1e-9) / len(arrived)
        seconds = whole
        if self._away > _SHORT * (now - self._last):
            # The device has worked meanwhile, or it hasn't: between these two lies the truth.
            least = max(now - self._last - self._away, 1e-9) / len(arrived)
            seconds = min(max(self._usual, least), whole)
        else:
            self._usual = seconds
        self._last, self._away = now, 0.0
        return [replace(m, seconds=seconds, tokens_per_second=m.tokens / seconds) for m in arrived]


_SHORT = 0.1  # of the time between two arrivals: so much of the caller's makes no difference
