"""What a step and an evaluation come to, and how the numbers come back from the device."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lora.shaders.errors import LoraError


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

    def as_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


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


@dataclass(frozen=True)
class MetricsAtArrival:
    """Makes Metrics of a step once its numbers come back from the device."""

    step: int
    epoch: float
    learning_rate: float
    tokens: int
    trained_tokens: int

    def __call__(self, values: np.ndarray) -> Metrics:
        """The metrics; `values` is `Activations.metrics`: the loss first, from 64 on the norm."""
        return Metrics(
            step=self.step,
            epoch=self.epoch,
            loss=float(values[0]) / self.trained_tokens,
            grad_norm=float(values[64]),
            learning_rate=self.learning_rate,
            tokens=self.tokens,
            trained_tokens=self.trained_tokens,
            tokens_per_second=0.0,
            seconds=0.0,
        )


class StepClock:
    """Seconds between the arrivals of steps."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def timed(self, arrived: Sequence[Metrics]) -> list[Metrics]:
        """The same metrics with the time since the last arrival, shared equally."""
        if not arrived:
            return []
        now = time.perf_counter()
        seconds = max(now - self._last, 1e-9) / len(arrived)
        self._last = now
        return [replace(m, seconds=seconds, tokens_per_second=m.tokens / seconds) for m in arrived]


def check_finite(metrics: Metrics, precision: str) -> Metrics:
    """The same metrics, if the step went well.

    Raises:
        LoraError: a number is not finite.
    """
    if math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm):
        return metrics
    raise LoraError(
        f"Step {metrics.step}: the loss is {metrics.loss} and the gradient norm "
        f"{metrics.grad_norm}; the adapter stays as it was before. Lower train.learning_rate, "
        + ("set train.precision: f32 (f16 ends at 65504), " if precision == "f16" else "")
        + "or look for broken rows in the data."
    )
