"""Rows that are not counted: tokenized as they come, shuffled in a buffer.

They are gone through again in each epoch, and from the epoch's beginning when a run is resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from lora.data.batches import Batch, make_batch
from lora.data.examples import Example, Examples
from lora.data.masks import TextTokenizer
from lora.data.opened import OpenedSource, check_settings_of_chats
from lora.data.order import Share, check_settings, places_of
from lora.data.packing import best_fit_decreasing
from lora.data.pieces import PieceTokenizer, Task, tokenize_piece
from lora.data.table import TableWriter
from lora.shaders.errors import InputError

if TYPE_CHECKING:
    from lora.config.data_section import DataConfig


class StreamedExamples:
    """Examples of rows that come as they are asked for; each iteration goes through them anew.

    Args:
        sources: whose rows come one source after another.
        settings: the config's `data:`.
        tokenizer: the model's.
        now: what chat templates take for the time.

    Attributes:
        data_format: of the sources, for printing.
        dated: the chat template may write the time.
    """

    def __init__(
        self,
        sources: Sequence[OpenedSource],
        settings: DataConfig,
        tokenizer: TextTokenizer,
        now: datetime,
    ) -> None:
        formats = list(dict.fromkeys(source.shape.data_format for source in sources))
        if set(formats) <= {"completion", "text"}:
            check_settings_of_chats(settings, " and ".join(formats))
        self._sources = [
            (s, PieceTokenizer(Task(settings, s.shape, s.rows.is_pieces, now), tokenizer))
            for s in sources
        ]
        self.data_format = " and ".join(formats)
        self.dated = any(tokenizer.rows.is_dated for _, tokenizer in self._sources)

    def __iter__(self) -> Iterator[Example]:
        n_examples = 0
        for source, tokenizer in self._sources:
            for piece in source.rows.pieces():
                tokens = tokenize_piece(tokenizer, piece)
                if tokens.error is not None:
                    raise InputError(tokens.error)
                with TableWriter() as writer:
                    writer.add(tokens)
                    table = writer.finish(source.shape.data_format, self.dated)
                assert table is not None  # it has no folder
                for example in Examples([table]):
                    yield example
                    n_examples += 1
        if not n_examples:
            raise InputError("data.train: no token of its rows is trained.")

    def __str__(self) -> str:
        return f"{self.data_format} rows as they come"


class StreamedBatches:
    """The micro-batches of a run over rows that are not counted; see `BatchStream` (order.py).

    Args:
        examples: gives the examples of an epoch, from the first on, each time it is called.
        batch_size, gradient_accumulation, packing, max_length, shuffle, seed: as of `DataStream`.
        buffer: examples that are held: the next one is drawn from them, or they are packed
            together.
        steps: optimizer steps.
        share: of each step's micro-batches; what is given out are these.
    """

    def __init__(
        self,
        examples: Callable[[], Iterator[Example]],
        *,
        batch_size: int,
        gradient_accumulation: int,
        packing: bool,
        max_length: int,
        shuffle: bool,
        buffer: int,
        seed: int,
        steps: int,
        share: Share = Share(),  # noqa: B008 (frozen)
    ) -> None:
        self._share = share
        self._examples = examples
        self._batch_size = batch_size
        self._accumulation = gradient_accumulation
        self._capacity = batch_size * max_length if packing else None
        self._shuffle = shuffle
        self._buffer = buffer
        self._seed = seed
        self._epoch = 0
        self._offset = 0  # steps done in the epoch
        self._step = 0
        self._ahead: list[list[Example]] = []  # the next micro-batch, to know whether there is one
        self._coming: Iterator[list[Example]] | None = None
        self.total_steps = steps

    @property
    def epoch(self) -> float:
        """Whole passes over the rows so far: how long one is, nobody has said."""
        return float(self._epoch)

    @property
    def step(self) -> int:
        """Optimizer steps that were given out."""
        return self._step

    def __iter__(self) -> StreamedBatches:
        return self

    def __next__(self) -> list[Batch]:
        """Returns the micro-batches of the next step."""
        if self._step >= self.total_steps:
            raise StopIteration
        chosen = self._take(self._accumulation)
        self._step += 1
        sizes = [sum(len(example.ids) for example in examples) for examples in chosen]
        return [replace(make_batch(chosen[place]), place=place) for place in self._share.of(sizes)]

    def _take(self, number: int) -> list[list[Example]]:
        """So many micro-batches, fewer where the epoch ends; the next epoch begins behind them."""
        if self._coming is None:
            self._coming = self._micro_batches(self._epoch)
            self._ahead = list(islice(self._coming, 1))
        chosen = [*self._ahead, *islice(self._coming, number - 1)]
        self._ahead = list(islice(self._coming, 1))
        self._offset += 1
        if not self._ahead:
            self._epoch, self._offset, self._coming = self._epoch + 1, 0, None
        return chosen

    def state(self) -> dict[str, Any]:
        """Returns where the stream stands, as values that JSON can hold."""
        return {
            "epoch": self._epoch,
            "offset": self._offset,
            "step": self._step,
            "settings": self._settings(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from where `state` was taken: reads the epoch's rows again up to there.

        Raises:
            InputError: a setting that decides the order is not that of then, or the rows have
                become fewer.
        """
        check_settings(state.get("settings"), self._settings())
        epoch, offset, step = places_of(state)
        self._epoch, self._offset, self._coming = epoch, 0, None
        for _ in range(offset):
            self._take(self._accumulation)
        if (self._epoch, self._offset) != (epoch, offset):
            raise InputError(
                "The rows end before the place where the checkpoint was made; resume with the data "
                "of then, or start anew without --resume."
            )
        self._step = step

    def _settings(self) -> dict[str, Any]:
        return {
            "streaming": True,
            "batch_size": self._batch_size,
            "gradient_accumulation": self._accumulation,
            "packing": self._capacity is not None,
            "tokens_per_packed_row": self._capacity,
            "shuffle": self._shuffle,
            "shuffle_buffer": self._buffer,
            "seed": self._seed,
        }

    def _micro_batches(self, epoch: int) -> Iterator[list[Example]]:
        generator = np.random.default_rng((self._seed, epoch))
        examples = self._examples()
        if self._shuffle:
            examples = shuffled(examples, self._buffer, generator)
        if self._capacity is None:
            while found := list(islice(examples, self._batch_size)):
                yield found
            return
        while held := list(islice(examples, self._buffer)):
            lengths = np.array([len(example.ids) for example in held])
            places, starts = best_fit_decreasing(np.arange(len(held)), lengths, self._capacity)
            rows = np.arange(len(starts) - 1)
            for row in generator.permutation(rows) if self._shuffle else rows:
                yield [held[place] for place in places[starts[row] : starts[row + 1]]]


def shuffled(
    examples: Iterator[Example], buffer: int, generator: np.random.Generator
) -> Iterator[Example]:
    """Examples in another order: each is drawn from `buffer` of them that are held."""
    held = list(islice(examples, buffer))
    for example in examples:
        place = int(generator.integers(len(held)))
        yield held[place]
        held[place] = example
    for place in generator.permutation(len(held)):
        yield held[place]
