"""The order of a whole run: which examples stand in which micro-batch of which step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from lora.data.batches import Batch, make_batch
from lora.data.examples import Example, Examples, lengths_of, trained_of
from lora.data.packing import best_fit_decreasing
from lora.data.table import starts_of
from lora.shaders.errors import InputError
from lora.shaders.untrusted import whole_number

_WEIGHTED = 0x3E16  # beside the seed, for the draw of rows whose weight isn't whole
_ROWS_OF_EPOCH = 0x9AC  # beside the seed and the epoch, for the order of packed rows


@dataclass(frozen=True)
class Share:
    """Which micro-batches of a step one of several processes takes.

    They are dealt by their sizes, each to who has the fewest tokens so far, so that nobody waits
    longer than need be; whose a micro-batch is follows from the step's sizes alone.

    Attributes:
        rank: of the process.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def of(self, sizes: Sequence[int]) -> list[int]:
        """The places in a step, ascending, of this process's micro-batches.

        Args:
            sizes: tokens of each micro-batch of the step.
        """
        most = -(-len(sizes) // self.size)
        held = [0] * self.size
        dealt: list[list[int]] = [[] for _ in held]
        for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place], place)):
            open_to = [rank for rank in range(self.size) if len(dealt[rank]) < most]
            rank = min(open_to, key=lambda rank: (held[rank], rank))
            held[rank] += sizes[place]
            dealt[rank].append(place)
        return sorted(dealt[self.rank])


class BatchStream(Protocol):
    """The micro-batches of a run, step by step: an iterator over `list[Batch]`.

    Attributes:
        total_steps: optimizer steps in the whole run.
    """

    total_steps: int

    @property
    def epoch(self) -> float:
        """Passes over the examples so far, for example 1.25."""

    @property
    def step(self) -> int:
        """Optimizer steps that were given out."""

    def __iter__(self) -> BatchStream: ...
    def __next__(self) -> list[Batch]: ...
    def state(self) -> dict[str, Any]:
        """Where the stream stands, as values that JSON can hold."""

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from where `state` was taken."""


@dataclass(frozen=True)
class UsualMicroBatch:
    """What a run's micro-batches hold on average, over its first epoch.

    Attributes:
        tokens, trained: of one.
        squared_lengths: the sum over its examples, which is what attention goes by.
        a_step: how many micro-batches a step has, of all processes together.
    """

    tokens: float
    trained: float
    squared_lengths: float
    a_step: float


@dataclass(frozen=True)
class _Plan:
    """An epoch's micro-batches.

    Attributes:
        examples: int64, places in the examples, one micro-batch after another.
        starts: where each micro-batch begins, one number more than there are.
    """

    examples: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def micro_batch(self, index: int) -> list[int]:
        """The examples of one."""
        found: list[int] = self.examples[self.starts[index] : self.starts[index + 1]].tolist()
        return found


class DataStream:
    """The micro-batches of a run over examples that are all there; see `BatchStream`.

    Each epoch's order comes from (seed, epoch) alone, so the epoch and the steps done in it say
    everything that follows.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        gradient_accumulation: int = 1,
        packing: bool = False,
        max_length: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        epochs: float = 1.0,
        steps: int | None = None,
        share: Share = Share(),  # noqa: B008 (frozen)
    ) -> None:
        """Prepares the run.

        Args:
            examples: at least one.
            batch_size: examples a micro-batch.
            gradient_accumulation: micro-batches a step; the last step of an epoch may have fewer.
            packing: fill a micro-batch with as many examples as fit into batch_size · max_length
                tokens instead.
            max_length: most tokens of an example; read only when packing.
            shuffle: another order in each epoch; else the order given.
            seed: of the shuffle.
            epochs: passes over the examples; the part of a last one is rounded up to a step.
            steps: optimizer steps; wins over epochs.
            share: of the step's micro-batches; what is given out are these.
        """
        self._share = share
        self._examples = examples
        self._lengths = lengths_of(examples)
        weights = examples.weights if isinstance(examples, Examples) else np.ones(len(examples))
        self._weights = None if bool((weights == 1).all()) else weights
        self._shuffle = shuffle
        self._seed = seed
        self._batch_size = batch_size
        self._accumulation = gradient_accumulation
        self._capacity = batch_size * max_length if packing else None
        self._epoch = 0
        self._offset = 0
        self._step = 0
        self._planned: tuple[int, _Plan] | None = None
        self.total_steps = steps if steps is not None else self._steps_of(epochs)

    @property
    def epoch(self) -> float:
        """Passes over the examples so far, for example 1.25."""
        return self._epoch + self._offset / self.steps_per_epoch(self._epoch)

    @property
    def step(self) -> int:
        """Optimizer steps that were given out."""
        return self._step

    @property
    def packing_efficiency(self) -> float | None:
        """The share of its micro-batches that the first epoch's tokens fill; None unpacked."""
        if self._capacity is None:
            return None
        plan = self._plan(0)
        return float(self._lengths[plan.examples].sum(dtype=np.int64)) / (
            self._capacity * len(plan)
        )

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Optimizer steps in one epoch; epochs differ only when packing, or by weights."""
        return math.ceil(len(self._plan(epoch)) / self._accumulation)

    def usual_micro_batch(self) -> UsualMicroBatch:
        """The average one of the first epoch."""
        plan = self._plan(0)
        n = len(plan)
        lengths = self._lengths[plan.examples].astype(np.float64)
        trained = trained_of(self._examples)[plan.examples]
        return UsualMicroBatch(
            tokens=float(lengths.sum()) / n,
            trained=float(trained.sum(dtype=np.int64)) / n,
            squared_lengths=float((lengths**2).sum()) / n,
            a_step=n / self.steps_per_epoch(),
        )

    def __iter__(self) -> DataStream:
        return self

    def __next__(self) -> list[Batch]:
        """Returns the micro-batches of the next step, as many of them as are this process's."""
        if self._step >= self.total_steps:
            raise StopIteration
        plan = self._plan(self._epoch)
        first = self._offset * self._accumulation
        chosen = range(first, min(first + self._accumulation, len(plan)))
        self._step += 1
        self._offset += 1
        if self._offset >= self.steps_per_epoch(self._epoch):
            self._epoch, self._offset = self._epoch + 1, 0
        sizes = [int(self._lengths[plan.micro_batch(m)].sum()) for m in chosen]
        return [
            replace(
                make_batch([self._examples[i] for i in plan.micro_batch(chosen[place])]),
                place=place,
            )
            for place in self._share.of(sizes)
        ]

    def state(self) -> dict[str, Any]:
        """Returns where the stream stands, as values that JSON can hold."""
        return {
            "epoch": self._epoch,
            "offset": self._offset,
            "step": self._step,
            "settings": self._settings,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from where `state` was taken; more or fewer total steps than then are fine.

        Raises:
            InputError: the data or a setting that decides the order are not those of then.
        """
        check_settings(state.get("settings"), self._settings)
        self._epoch, self._offset, self._step = places_of(state)

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """Everything that the order depends on."""
        settings: dict[str, Any] = {
            "n_examples": len(self._examples),
            "n_tokens": int(self._lengths.sum(dtype=np.int64)),
            "batch_size": self._batch_size,
            "gradient_accumulation": self._accumulation,
            "packing": self._capacity is not None,
            "tokens_per_packed_row": self._capacity,
            "shuffle": self._shuffle,
            "seed": self._seed,
        }
        if self._capacity is not None:
            settings["packed_by"] = "best-fit decreasing"
        if self._weights is not None:
            values, counts = np.unique(self._weights, return_counts=True)
            settings["weights"] = [values.tolist(), counts.tolist()]
        return settings

    def _steps_of(self, epochs: float) -> int:
        whole = int(epochs)
        part = math.ceil((epochs - whole) * self.steps_per_epoch(whole)) if epochs > whole else 0
        if self._capacity is None and self._weights is None:
            return whole * self.steps_per_epoch() + part
        return sum(self.steps_per_epoch(epoch) for epoch in range(whole)) + part

    def _taken(self, epoch: int) -> np.ndarray:
        """The examples of an epoch, each as often as its weight says, in the order given.

        Of 0.5 two epochs together take each once, of 1.5 each three times.
        """
        if self._weights is None:
            return np.arange(len(self._examples))
        taken = []
        for weight in np.unique(self._weights):
            own = np.flatnonzero(self._weights == weight)
            draw = np.random.default_rng((self._seed, _WEIGHTED)).permutation(own)
            first, last = (round((epoch + more) * weight * len(own)) for more in (0, 1))
            taken.append(draw[np.arange(first, last) % len(own)])
        every = np.sort(np.concatenate(taken))
        # A few rows of small weights are not none.
        return every if len(every) else np.array([epoch % len(self._examples)])

    def _plan(self, epoch: int) -> _Plan:
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, self._planned_epoch(epoch)
        return self._planned[1]

    def _planned_epoch(self, epoch: int) -> _Plan:
        order = self._taken(epoch)
        if self._shuffle:
            generator = np.random.default_rng((self._seed, epoch))
            order = order[generator.permutation(len(order))]
        if self._capacity is None:
            starts = np.arange(0, len(order), self._batch_size)
            return _Plan(order, np.append(starts, len(order)))
        examples, starts = best_fit_decreasing(order, self._lengths, self._capacity)
        if not self._shuffle:
            return _Plan(examples, starts)
        # They were begun with the longest examples, and shall come in any order.
        generator = np.random.default_rng((self._seed, epoch, _ROWS_OF_EPOCH))
        rows = generator.permutation(len(starts) - 1)
        moved = [examples[starts[row] : starts[row + 1]] for row in rows]
        return _Plan(np.concatenate(moved), starts_of(np.diff(starts)[rows]))


def places_of(state: dict[str, Any]) -> tuple[int, int, int]:
    """Epoch, steps of it, and steps in all, of a state that a file holds.

    Raises:
        InputError: one of them is no whole number.
    """
    epoch, offset, step = (
        whole_number(state, key, "The checkpoint") for key in ("epoch", "offset", "step")
    )
    return epoch, offset, step


def check_settings(then: Any, now: dict[str, Any]) -> None:
    """Refuses a state that was made with other data or settings.

    Raises:
        InputError: one differs.
    """
    if not isinstance(then, dict):
        raise InputError("The checkpoint doesn't say what data it was made with; it is damaged.")
    for name in {**now, **then}:
        if then.get(name) != now.get(name):
            raise InputError(
                f"The checkpoint was made with {name} {then.get(name)}, and now it is "
                f"{now.get(name)}; resume with the data and the settings of then, or start anew "
                "without --resume."
            )
