"""Examples: tokens of rows, and which of them the model is trained to predict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import overload

import numpy as np

from lora.data.table import NO_TURN, REASONS, TokenTable, starts_of


@dataclass(frozen=True)
class Example:
    """One row as tokens, or one turn of a row.

    Attributes:
        ids: int32 [n], the tokens, n at most data.max_length.
        trained: bool [n]; trained[t] says that token t is predicted from those before it and
            counts in the loss. trained[0] is False: nothing stands before it.
        index: its place in the list that `load_examples` returned.
        cut: data.max_length cut off some of what would be trained, an answer's end at least.
        row: the record's place in the data set, counted from 0.
        turn: the message that is trained, where the example is of one turn, since the whole
            rendering shows it otherwise than it was said; None for a whole row.
        n_cut: tokens that data.max_length cut off its end.
        part: which stretch of a longer row it is, counted from 0 (data.overflow: split).
    """

    ids: np.ndarray
    trained: np.ndarray
    index: int
    cut: bool = False
    row: int = 0
    turn: int | None = None
    n_cut: int = 0
    part: int = 0


@dataclass(frozen=True)
class DataSummary:
    """What was loaded, for printing."""

    data_format: str  # chat, completion, instruct or text, or several of these
    n_examples: int  # of the rows that are used; a chat may give several
    n_tokens: int  # of all of them, after cutting
    n_trained_tokens: int  # of these, tokens that count in the loss
    n_cut: int  # examples longer than max_length, cut at the end
    n_untrained: int  # rows left out because no token of theirs is trained
    longest: int  # tokens of the longest example before cutting
    max_length: int  # tokens that an example may have
    n_rows: int  # of the data set
    left_out: Mapping[str, int] = field(default_factory=dict)  # why, and how many of n_untrained
    ignored: tuple[str, ...] = ()  # columns that carry no meaning here
    dated: bool = False  # the chat template may write the time
    n_split: int = 0  # examples longer than max_length, split into several

    def __str__(self) -> str:
        n_used = self.n_rows - self.n_untrained
        text = f"{self.n_examples} {self.data_format} examples"
        text += f" of {n_used} rows" if n_used != self.n_examples else ""
        text += (
            f", {self.n_tokens} tokens, {self.n_trained_tokens} of them trained; the longest "
            f"{'row' if n_used == self.n_examples else 'example'} has {self.longest}"
        )
        if self.n_cut:
            text += f"; {self.n_cut} cut to {self.max_length}"
        if self.n_split:
            text += f"; {self.n_split} split at {self.max_length}"
        for reason, number in self.left_out.items():
            text += f"; {number} left out, {reason}"
        if self.ignored:
            text += f"; ignored columns: {', '.join(map(printable, self.ignored))}"
        return text


@dataclass(frozen=True)
class LeftOut:
    """A row that gives no example.

    Attributes:
        row: its place in the data set, counted from 0.
        reason: as part of a sentence.
    """

    row: int
    reason: str


class Examples(Sequence[Example]):
    """Examples out of tables; each is made when it is asked for.

    Args:
        tables: of the sources, in their order.
        weights: one a source: how often an epoch takes its rows.
        rows: the rows that count, ascending; None for all.

    Attributes:
        lengths: int32 [n], tokens of each.
        n_trained: int32 [n], of these, tokens that are trained.
        rows: int64 [n], the row of each.
        weights: f64 [n], how often an epoch takes each.
        first_rows: int64 [sources + 1], the number of each source's first row, and of all rows.
    """

    def __init__(
        self,
        tables: Sequence[TokenTable],
        weights: Sequence[float] | None = None,
        rows: np.ndarray | None = None,
    ) -> None:
        self.tables = tables
        self.first_rows = starts_of([table.n_rows for table in tables])
        self._firsts = starts_of([len(table.arrays["lengths"]) for table in tables])
        self._starts = [starts_of(table.arrays["lengths"]) for table in tables]
        every = self._joined("rows", self.first_rows)
        self._chosen = None if rows is None else np.flatnonzero(np.isin(every, rows))
        self.rows = self._taken(every)
        self.lengths = self._taken(self._joined("lengths"))
        self.n_trained = self._taken(self._joined("n_trained"))
        counts = np.diff(self._firsts)
        self.weights = self._taken(np.repeat(list(weights or [1.0] * len(tables)), counts))

    def _joined(self, name: str, offsets: Sequence[int] | np.ndarray = ()) -> np.ndarray:
        parts = [table.arrays[name] for table in self.tables]
        if len(offsets):
            parts = [
                part.astype(np.int64) + offset for part, offset in zip(parts, offsets, strict=False)
            ]
        return np.concatenate([np.zeros(0, np.int32), *parts])

    def _taken(self, values: np.ndarray) -> np.ndarray:
        return values if self._chosen is None else values[self._chosen]

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = int(index) % len(self)
        place = index if self._chosen is None else int(self._chosen[index])
        which = int(np.searchsorted(self._firsts, place, side="right")) - 1
        own = place - int(self._firsts[which])
        arrays = self.tables[which].arrays
        start, stop = (int(self._starts[which][own + more]) for more in (0, 1))
        turn = int(arrays["turns"][own])
        return Example(
            ids=arrays["ids"][start:stop],
            trained=arrays["trained"][start:stop],
            index=index,
            cut=bool(arrays["cut"][own]),
            row=int(self.rows[index]),
            turn=None if turn == NO_TURN else turn,
            n_cut=int(arrays["n_cut"][own]),
            part=int(arrays["parts"][own]),
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def parts(self) -> np.ndarray:
        """int32 [n], which stretch of a longer row each is."""
        return self._taken(self._joined("parts"))

    @property
    def n_cut(self) -> np.ndarray:
        """int32 [n], tokens cut off each one's end."""
        return self._taken(self._joined("n_cut"))

    def place(self, row: int) -> str:
        """Where a row stands: `data/train.jsonl, line 3`."""
        which = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        return self.tables[which].place(row - int(self.first_rows[which]))

    @cached_property
    def reasons(self) -> np.ndarray:
        """int8 [rows of all sources], by `REASONS` why each gives no example."""
        return self._joined("reasons")

    @cached_property
    def texts(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each tokenized text, those left out, too: its row and its tokens before cutting."""
        return self._joined("text_rows", self.first_rows), self._joined("text_lengths")


class Places(Sequence[str]):
    """Where each row stands."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples.reasons)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._examples.place(i) for i in range(*index.indices(len(self)))]
        return self._examples.place(index)


@dataclass(frozen=True)
class LoadedData:
    """A whole data set as examples.

    Attributes:
        places: where each row is: `data/train.jsonl, line 3`.
        lengths: int32, tokens of each text before cutting, those of rows left out, too.
        left_out_rows: the rows that give no example, ascending.
    """

    examples: Examples
    places: Sequence[str]
    lengths: np.ndarray
    left_out_rows: np.ndarray
    summary: DataSummary

    @property
    def left_out(self) -> list[LeftOut]:
        """The rows that give no example."""
        reasons = self.examples.reasons
        return [LeftOut(int(row), REASONS[reasons[row]]) for row in self.left_out_rows]


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """Tokens of each example, int32."""
    if isinstance(examples, Examples):
        return examples.lengths
    return np.array([len(example.ids) for example in examples], np.int32)


def trained_of(examples: Sequence[Example]) -> np.ndarray:
    """Trained tokens of each example, int32."""
    if isinstance(examples, Examples):
        return examples.n_trained
    return np.array([int(example.trained.sum()) for example in examples], np.int32)


def id_range(examples: Sequence[Example]) -> tuple[int, int]:
    """The smallest and the largest token id; (0, 0) of no examples."""
    if isinstance(examples, Examples):
        arrays = [table.arrays["ids"] for table in examples.tables]
    else:
        arrays = [example.ids for example in examples]
    arrays = [array for array in arrays if len(array)]
    if not arrays:
        return 0, 0
    return min(int(a.min()) for a in arrays), max(int(a.max()) for a in arrays)


def printable(text: str) -> str:
    """A text without what a terminal would obey: other characters than printable ones escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
