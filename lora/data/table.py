"""Tokenized rows as flat arrays: in memory, or in the files of a folder, mapped and not read.

A million rows are no million objects: an Example is made when it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

# Why a row gives no example; numbers of these are kept, the first stands for none.
USED = 0
REASONS = (
    "",
    "empty, or without a turn to train",
    "what is trained begins beyond data.max_length",
    "of weight 0",
    "longer than data.max_length",
)
UNTRAINED, TOO_LONG, NO_WEIGHT, DROPPED = 1, 2, 3, 4
NO_TURN = -1

_TOKENS = {"ids": np.int32, "trained": np.bool_}  # one a token
_EXAMPLES = {
    "lengths": np.int32,
    "n_trained": np.int32,
    "rows": np.int32,  # of the table, counted from 0
    "turns": np.int32,
    "parts": np.int32,
    "n_cut": np.int32,
    "cut": np.bool_,
}
_TEXTS = {"text_rows": np.int32, "text_lengths": np.int32}  # before cutting, left out ones, too
_ROWS = {"reasons": np.int8, "labels": np.int32, "numbers": np.int64}
_ARRAYS = {**_TOKENS, **_EXAMPLES, **_TEXTS, **_ROWS}
_META = "meta.json"


@dataclass
class TokenizedPiece:
    """What became of a piece of rows.

    Attributes:
        arrays: by the names of `TokenTable`; rows are counted from the piece's first.
        label: of its rows.
        ignored: columns without a meaning.
        error: what is wrong with its first wrong row, whose place it names; None for nothing.
    """

    arrays: dict[str, np.ndarray]
    label: str
    ignored: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class TokenTable:
    """A source's rows, tokenized.

    Attributes:
        data_format: chat, completion, instruct or text.
        dated: the chat template may have written the time.
        label_names: what stands before a row's number: `data/train.jsonl, line`.
        ignored: columns without a meaning.
        arrays: ids int32 and trained bool, one a token; of each example: lengths, n_trained, rows,
            turns (NO_TURN for a whole row), parts, n_cut and cut; of each tokenized text: text_rows
            and text_lengths, before cutting; of each row: reasons, labels, numbers.
    """

    data_format: str
    dated: bool
    label_names: tuple[str, ...]
    ignored: tuple[str, ...]
    arrays: dict[str, np.ndarray]

    @property
    def n_rows(self) -> int:
        """Rows of the source."""
        return len(self.arrays["reasons"])

    def place(self, row: int) -> str:
        """Where a row stands: `data/train.jsonl, line 3`."""
        label = self.label_names[int(self.arrays["labels"][row])]
        return f"{label} {int(self.arrays['numbers'][row])}"

    @classmethod
    def load(cls, folder: Path) -> TokenTable:
        """Maps the files of a folder.

        Raises:
            OSError, ValueError, KeyError: they are damaged, or not there.
        """
        meta = json.loads((folder / _META).read_text())
        arrays = {name: _mapped(folder / name, dtype) for name, dtype in _ARRAYS.items()}
        if [len(arrays[name]) for name in _ARRAYS] != meta["lengths"]:
            raise ValueError("files of other lengths")
        return cls(
            meta["data_format"],
            meta["dated"],
            tuple(meta["label_names"]),
            tuple(meta["ignored"]),
            arrays,
        )


@dataclass
class TableWriter:
    """Puts pieces together, in their order.

    Args:
        folder: where the files go; None keeps all in memory.
    """

    folder: Path | None = None
    n_rows: int = 0
    _held: dict[str, list[np.ndarray]] = field(
        default_factory=lambda: {name: [] for name in _ARRAYS}
    )
    _labels: dict[str, int] = field(default_factory=dict)
    _ignored: dict[str, None] = field(default_factory=dict)
    _files: dict[str, BinaryIO] = field(default_factory=dict)

    def __enter__(self) -> TableWriter:
        if self.folder is not None:
            self._files = {name: open(self.folder / name, "wb") for name in _TOKENS}  # noqa: SIM115
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, piece: TokenizedPiece) -> None:
        """Appends a piece that has no error."""
        arrays = piece.arrays
        label = self._labels.setdefault(piece.label, len(self._labels))
        n_rows = len(arrays["reasons"])
        moved: dict[str, Any] = {
            "rows": arrays["rows"] + self.n_rows,
            "text_rows": arrays["text_rows"] + self.n_rows,
            "labels": np.full(n_rows, label, np.int32),
        }
        for name, dtype in _ARRAYS.items():
            values: np.ndarray = np.asarray(moved.get(name, arrays.get(name)), dtype)
            if name in self._files:
                self._files[name].write(values.tobytes())
            else:
                self._held[name].append(values)
        self.n_rows += n_rows
        self._ignored |= dict.fromkeys(piece.ignored)

    def finish(self, data_format: str, dated: bool) -> TokenTable | None:
        """The table; None where it lies in the folder, to be loaded from there."""
        whole: dict[str, np.ndarray] = {
            name: np.concatenate([np.zeros(0, dtype), *self._held[name]], dtype=dtype)
            for name, dtype in _ARRAYS.items()
            if name not in self._files
        }
        if self.folder is None:
            return TokenTable(data_format, dated, tuple(self._labels), tuple(self._ignored), whole)
        lengths = {}
        for name, file in self._files.items():
            lengths[name] = file.tell() // np.dtype(_ARRAYS[name]).itemsize
            file.close()
        for name, values in whole.items():
            (self.folder / name).write_bytes(values.tobytes())
            lengths[name] = len(values)
        meta = {
            "data_format": data_format,
            "dated": dated,
            "label_names": list(self._labels),
            "ignored": list(self._ignored),
            "lengths": [lengths[name] for name in _ARRAYS],
        }
        (self.folder / _META).write_text(json.dumps(meta))
        return None


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    if path.stat().st_size == 0:  # can't be mapped
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))


def starts_of(lengths: np.ndarray | Sequence[int]) -> np.ndarray:
    """Where each of so many begins, if they lie end to end; int64, one more than there are."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
