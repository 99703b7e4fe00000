"""Examples to micro-batches: one flat row of tokens each, and the order of a whole run.

The examples of a micro-batch lie end to end without padding; each token carries the bounds of
its example, and attention stays inside them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora.data.examples import Example
from lora.shaders.errors import InputError

IGNORED = -100  # the target of a token whose successor isn't trained, as in PyTorch


@dataclass(frozen=True)
class Batch:
    """A micro-batch of n tokens.

    Attributes:
        token_ids: int32 [n].
        positions: int32 [n], counted from 0 in each example.
        segment_start: int32 [n], where the token's example begins in this row.
        segment_end: int32 [n], where it ends, exclusive.
        targets: int32 [n], the next token's id where that is trained, else IGNORED. The last
            token of an example has none.
        examples: `Example.index` of each example, in the order in which they lie here.
        example_starts: where each of them begins, as many as examples.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    segment_start: np.ndarray
    segment_end: np.ndarray
    targets: np.ndarray
    examples: list[int]
    example_starts: list[int]

    @property
    def rows(self) -> int:
        """Tokens in it."""
        return len(self.token_ids)

    @property
    def n_trained(self) -> int:
        """Tokens that count in the loss."""
        return int(np.count_nonzero(self.targets != IGNORED))


def make_batch(examples: Sequence[Example]) -> Batch:
    """Lays examples (at least one) end to end."""
    lengths = np.array([len(example.ids) for example in examples], dtype=np.int32)
    ends = np.cumsum(lengths, dtype=np.int32)
    starts = ends - lengths
    token_ids = np.concatenate([example.ids for example in examples])
    # trained[0] of each example is False, so no target crosses from one into the next.
    trained = np.concatenate([example.trained for example in examples])
    trained[starts] = False
    targets = np.full(len(token_ids), IGNORED, dtype=np.int32)
    targets[:-1] = np.where(trained[1:], token_ids[1:], IGNORED)
    segment_start = np.repeat(starts, lengths)
    return Batch(
        token_ids=token_ids,
        positions=np.arange(len(token_ids), dtype=np.int32) - segment_start,
        segment_start=segment_start,
        segment_end=np.repeat(ends, lengths),
        targets=targets,
        examples=[example.index for example in examples],
        example_starts=[int(start) for start in starts],
    )


def sequential_batches(examples: Sequence[Example], batch_size: int) -> Iterator[Batch]:
    """Yields every example once, in order, batch_size a micro-batch: for evaluation."""
    for first in range(0, len(examples), batch_size):
        yield make_batch(examples[first : first + batch_size])


class DataStream:
    """The micro-batches of a run, step by step: an iterator over `list[Batch]`.

    Each epoch's order comes from (seed, epoch) alone, so the epoch and the steps done in it say
    everything that follows.

    Attributes:
        total_steps: optimizer steps in the whole run.
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
        """
        self._examples = examples
        self._lengths = [len(example.ids) for example in examples]
        self._n_tokens = sum(self._lengths)  # once: `state` is asked for in every step
        self._shuffle = shuffle
        self._seed = seed
        self._batch_size = batch_size
        self._accumulation = gradient_accumulation
        self._capacity = batch_size * max_length if packing else None
        self._epoch = 0
        self._offset = 0
        self._step = 0
        self._planned_epoch: int | None = None
        self._plan: list[list[int]] = []
        self.total_steps = steps if steps is not None else self._steps_of(epochs)

    @property
    def epoch(self) -> float:
        """Passes over the examples so far, for example 1.25."""
        return self._epoch + self._offset / self.steps_per_epoch(self._epoch)

    @property
    def step(self) -> int:
        """Optimizer steps that were given out."""
        return self._step

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Optimizer steps in one epoch; it varies between epochs only when packing."""
        return math.ceil(len(self._micro_batches(epoch)) / self._accumulation)

    def __iter__(self) -> DataStream:
        return self

    def __next__(self) -> list[Batch]:
        """Returns the micro-batches of the next step."""
        if self._step >= self.total_steps:
            raise StopIteration
        plan = self._micro_batches(self._epoch)
        first = self._offset * self._accumulation
        chosen = plan[first : first + self._accumulation]
        self._step += 1
        self._offset += 1
        if self._offset >= self.steps_per_epoch(self._epoch):
            self._epoch, self._offset = self._epoch + 1, 0
        return [make_batch([self._examples[i] for i in micro_batch]) for micro_batch in chosen]

    def state(self) -> dict[str, Any]:
        """Returns where the stream stands, as values that JSON can hold."""
        return {
            "epoch": self._epoch,
            "offset": self._offset,
            "step": self._step,
            "settings": self._settings(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from where `state` was taken; more or fewer total steps than then are fine.

        Raises:
            InputError: the data or a setting that decides the order are not those of then.
        """
        for name, now in self._settings().items():
            then = state["settings"].get(name)
            if then != now:
                raise InputError(
                    f"The checkpoint was made with {name} {then}, and now it is {now}; resume "
                    "with the data and the settings of then, or start anew without --resume."
                )
        self._epoch, self._offset, self._step = state["epoch"], state["offset"], state["step"]

    def _settings(self) -> dict[str, Any]:
        """Everything that the order depends on."""
        return {
            "n_examples": len(self._examples),
            "n_tokens": self._n_tokens,
            "batch_size": self._batch_size,
            "gradient_accumulation": self._accumulation,
            "packing": self._capacity is not None,
            "tokens_per_packed_row": self._capacity,
            "shuffle": self._shuffle,
            "seed": self._seed,
        }

    def _steps_of(self, epochs: float) -> int:
        whole = int(epochs)
        part = math.ceil((epochs - whole) * self.steps_per_epoch(whole)) if epochs > whole else 0
        if self._capacity is None:
            return whole * self.steps_per_epoch() + part
        return sum(self.steps_per_epoch(epoch) for epoch in range(whole)) + part

    def _micro_batches(self, epoch: int) -> list[list[int]]:
        """The epoch's micro-batches as positions in the examples."""
        if self._planned_epoch != epoch:
            order = list(range(len(self._examples)))
            if self._shuffle:
                generator = np.random.default_rng((self._seed, epoch))
                order = [int(i) for i in generator.permutation(len(order))]
            if self._capacity is None:
                size = self._batch_size
                self._plan = [order[i : i + size] for i in range(0, len(order), size)]
            else:
                self._plan = _first_fit(order, self._lengths, self._capacity)
            self._planned_epoch = epoch
        return self._plan


def _first_fit(order: list[int], lengths: list[int], capacity: int) -> list[list[int]]:
    """Puts each example into the first micro-batch that has room for it.

    An example longer than the capacity would get a micro-batch of its own; data.max_length keeps
    that from happening.
    """
    packed: list[list[int]] = []
    room = np.zeros(len(order), dtype=np.int64)
    shortest = min(lengths)
    first_open = 0  # those before it are full; without this, packing is quadratic sooner
    for index in order:
        fits = room[first_open : len(packed)] >= lengths[index]
        chosen = first_open + int(np.argmax(fits)) if fits.any() else len(packed)
        if chosen == len(packed):
            packed.append([])
            room[chosen] = capacity
        packed[chosen].append(index)
        room[chosen] -= lengths[index]
        while first_open < len(packed) and room[first_open] < shortest:
            first_open += 1
    return packed
