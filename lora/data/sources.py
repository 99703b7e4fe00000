"""Where rows come from: what a source of the config means, and its raw rows in pieces."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lora.data.readers import ENDINGS, DataFile, without_none
from lora.data.splits import Part, parts_of
from lora.shaders.errors import InputError

if TYPE_CHECKING:
    from lora.config.data_section import SourceConfig

Split = Literal["train", "eval"]
PIECE_ROWS = 2000
_STREAMED_ROWS = 32  # few: whoever streams waits for the first
_PIECE_BYTES = 1 << 19  # of lines that are not parsed yet
_WANTED = {"train": ("train",), "eval": ("validation", "valid", "test")}


@dataclass(frozen=True)
class Piece:
    """Some raw rows of a source, one after another.

    Attributes:
        label: what stands before a row's number in errors: `data/train.jsonl, line`.
        numbers: one a row.
        rows: lines of JSON as bytes, or values by column.
    """

    label: str
    numbers: Sequence[int]
    rows: Sequence[Any]


class RowSource(Protocol):
    """Rows in their order, which can be gone through again."""

    @property
    def name(self) -> str: ...
    @property
    def is_pieces(self) -> bool:
        """Whether rows are pieces of plain text, which goes on behind each."""

    def first(self) -> Piece | None:
        """The first row, or more; None where there is none."""

    def pieces(self) -> Iterator[Piece]: ...
    def fingerprint(self) -> str | None:
        """Of all that is read; None where that can't be known."""


@dataclass(frozen=True)
class _Stretch:
    """A part of the rows of files, or of a data set."""

    found: Any  # list[DataFile], or what `datasets` gave
    part: Part
    name: str

    def rows(self) -> Iterator[tuple[str, int, Any]]:
        """(label, number, raw row) of each."""
        if self.part.is_whole:
            return self._all()
        n_rows = self._count() if self.part.needs_count else 2**62
        start, stop = self.part.bounds(n_rows)
        return islice(self._all(), start, stop)

    def _count(self) -> int:
        if hasattr(self.found, "__len__") and not isinstance(self.found, list):
            return len(self.found)
        return sum(1 for _ in self._all())

    def _all(self) -> Iterator[tuple[str, int, Any]]:
        if isinstance(self.found, list):
            for file in self.found:
                label = file.label(file.kind)
                for number, row in file.rows():
                    yield label, number, row
            return
        label, number = f"{self.name}, row", 0
        data_set = self.found.with_format("arrow")
        for table in data_set.iter(batch_size=1000):  # a whole one, or one that is streamed
            for values in table.to_pylist():
                yield label, number, without_none(values)
                number += 1

    def fingerprint(self) -> str | None:
        """Of the contents."""
        if not isinstance(self.found, list):
            found = getattr(self.found, "_fingerprint", None)
            return None if found is None else f"{found} {self.part}"
        digest = hashlib.sha256(repr(self.part).encode())
        for file in self.found:
            digest.update(f"{file.name}\0{file.sample_by}\0".encode(errors="backslashreplace"))
            with open(file.path, "rb") as contents:
                digest.update(hashlib.file_digest(contents, "sha256").digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class StoredRows:
    """Rows of files or of a data set.

    Attributes:
        name: as users know it.
        limit: rows at most; None for all.
    """

    name: str
    stretches: tuple[_Stretch, ...]
    limit: int | None

    @property
    def is_pieces(self) -> bool:
        """See `RowSource`."""
        files = [s.found for s in self.stretches if isinstance(s.found, list)]
        return bool(files) and all(file.is_pieces for found in files for file in found)

    def rows(self) -> Iterator[tuple[str, int, Any]]:
        """(label, number, raw row) of each."""
        every = (row for stretch in self.stretches for row in stretch.rows())
        return islice(every, self.limit)

    def first(self) -> Piece | None:
        """See `RowSource`."""
        return next(_pieces(islice(self.rows(), 1)), None)

    def pieces(self) -> Iterator[Piece]:
        """See `RowSource`."""
        return _pieces(self.rows())

    def fingerprint(self) -> str | None:
        """See `RowSource`."""
        found = [stretch.fingerprint() for stretch in self.stretches]
        return None if None in found else f"{found} {self.limit}"


@dataclass(frozen=True)
class GivenRows:
    """Rows that a script gives."""

    rows: Iterable[Any]
    name: str = "examples"
    is_pieces: bool = False

    def first(self) -> Piece | None:
        """See `RowSource`."""
        peek = getattr(self.rows, "first", None)
        rows = peek() if peek is not None else list(islice(iter(self.rows), 1))
        return Piece(f"{self.name}, row", [0], rows) if rows else None

    def pieces(self) -> Iterator[Piece]:
        """See `RowSource`."""
        rows = ((f"{self.name}, row", i, without_none(row)) for i, row in enumerate(self.rows))
        return _pieces(rows, PIECE_ROWS if hasattr(self.rows, "__len__") else _STREAMED_ROWS)

    def fingerprint(self) -> str | None:
        """See `RowSource`."""
        return None


def open_source(source: SourceConfig, split: Split, *, streaming: bool = False) -> StoredRows:
    """What a source of the config names.

    Args:
        source: of data.train or data.eval.
        split: which of these; it decides which split of a data set is taken where none is named.
        streaming: rows of the hub as they come.

    Raises:
        InputError: there is nothing, or nothing of that split.
    """
    name = source.place
    _check_name(name)
    wanted = None if source.split is None else parts_of(source.split)
    if source.name is None and not is_directory(name):
        file = _file(source)
        if file is not None:
            parts = wanted or [Part("train")]
            other = next((part.name for part in parts if part.name != "train"), None)
            if source.config is not None or other is not None:
                what = f"config {source.config}" if source.config else f"split {other}"
                raise InputError(f"{name}: a file has no {what}; it is all of one split, train.")
            found = tuple(_Stretch([file], part, name) for part in parts)
            return StoredRows(name, found, source.max_samples)
    from lora.data.hub import splits_of

    splits = splits_of(name, source.config, streaming=streaming, sample_by=source.sample_by)
    if wanted is None:
        names = _WANTED[split]
        first = next((one for one in names if one in splits), None)
        if first is None:
            raise InputError(
                f"{name}: the data set has no {' or '.join(names)} split; it has "
                f"{', '.join(splits)}."
            )
        wanted = [Part(first)]
    for part in wanted:
        if part.name not in splits:
            raise InputError(
                f"{name}: the data set has no split {part.name}; it has {', '.join(splits)}."
            )
    found = tuple(_Stretch(splits[part.name], part, name) for part in wanted)
    return StoredRows(name, found, source.max_samples)


def is_file_name(name: str) -> bool:
    """Whether `data.train` or `data.eval` names a file by this, and no data set or directory."""
    from lora.data.hub import is_hub_name

    return not is_directory(name) and (Path(name).exists() or not is_hub_name(name))


def is_directory(name: str) -> bool:
    """Whether it is a directory of data; one that is called like a file is a mistake."""
    return Path(name).is_dir() and Path(name).suffix.lower() not in ENDINGS


def _check_name(name: str) -> None:
    scheme, found, _ = name.partition("://")
    if found and scheme.isalnum():
        raise InputError(
            f"{name}: is a URL, and nothing is fetched from there; download it, and name the file."
        )


def _file(source: SourceConfig) -> DataFile | None:
    """The file that is named; None where it must be a data set of the hub.

    Raises:
        InputError: it is neither.
    """
    from lora.data.hub import is_hub_name

    path = Path(source.place)
    if not path.exists() and is_hub_name(source.place):
        return None
    file = DataFile(path, source.place, source.sample_by)
    file.check()
    if source.sample_by != "paragraph" and file.kind != "text":
        raise InputError(
            f"{source.place}: sample_by says what a row of plain text is, and this is no plain "
            "text; leave it out."
        )
    return file


def _pieces(rows: Iterable[tuple[str, int, Any]], most_rows: int = PIECE_ROWS) -> Iterator[Piece]:
    label, numbers, held, size = "", [], [], 0  # type: ignore[var-annotated]
    for name, number, row in rows:
        if held and (name != label or len(held) >= most_rows or size >= _PIECE_BYTES):
            yield Piece(label, numbers, held)
            numbers, held, size = [], [], 0
        label = name
        numbers.append(number)
        held.append(row)
        size += len(row) if isinstance(row, bytes) else 0
    if held:
        yield Piece(label, numbers, held)
