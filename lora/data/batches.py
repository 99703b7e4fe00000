"""Examples to micro-batches: one flat row of tokens each.

The examples of a micro-batch lie end to end without padding; each token carries the bounds of
its example, and attention stays inside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

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
        place: among the micro-batches of its step, of all processes, from 0.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    segment_start: np.ndarray
    segment_end: np.ndarray
    targets: np.ndarray
    examples: list[int]
    example_starts: list[int]
    place: int = 0

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


def check_batch(batch: Batch, vocab_size: int, longest: int, most_rows: int) -> None:
    """Refuses what the device would take, and give a loss for that means nothing.

    Args:
        batch: what is to be computed.
        vocab_size: entries of the model's vocabulary.
        longest: tokens of an example for which there are positions.
        most_rows: tokens of a micro-batch for which there is room.

    Raises:
        InputError: a token id is beyond the vocabulary, an example is longer, or there are more
            tokens.
    """
    for ids in (batch.token_ids, batch.targets[batch.targets != IGNORED]):
        wrong = ids[(ids < 0) | (ids >= vocab_size)]
        if len(wrong):
            raise InputError(
                f"An example has the token id {int(wrong[0])}, but the vocabulary of the model has "
                f"{vocab_size} entries; the tokenizer does not fit the model."
            )
    longest_here = int((batch.segment_end - batch.segment_start).max(initial=0))
    if longest_here > longest:
        raise InputError(
            f"An example has {longest_here} tokens, and the session was opened for examples of at "
            f"most {longest}; raise data.max_length, or cut the example."
        )
    if batch.rows > most_rows:
        raise InputError(
            f"A micro-batch has {batch.rows} tokens, and the session was opened for at most "
            f"{most_rows}; raise train.batch_size or data.max_length, or take fewer examples."
        )


def sequential_batches(examples: Sequence[Example], batch_size: int) -> Iterator[Batch]:
    """Yields every example once, in order, batch_size a micro-batch."""
    for first in range(0, len(examples), batch_size):
        yield make_batch(examples[first : first + batch_size])


def full_batches(examples: Iterable[Example], most_rows: int, most_targets: int) -> Iterator[Batch]:
    """Yields every example once, in order, as many a micro-batch as there is room: for evaluation.

    An example's numbers don't depend on its neighbours, and a device takes little longer for a
    full micro-batch than for one of a few short rows.

    Args:
        most_rows, most_targets: tokens and trained tokens that a micro-batch may have; an example
            that has more comes alone.
    """
    waiting: list[Example] = []
    rows, targets = 0, 0
    for example in examples:
        n_rows, n_targets = len(example.ids), int(example.trained.sum())
        if waiting and (rows + n_rows > most_rows or targets + n_targets > most_targets):
            yield make_batch(waiting)
            waiting, rows, targets = [], 0, 0
        waiting.append(example)
        rows, targets = rows + n_rows, targets + n_targets
    if waiting:
        yield make_batch(waiting)
