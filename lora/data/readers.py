"""Files to raw rows: JSONL, JSON arrays, CSV, TSV, Parquet, Arrow and plain text, also compressed.

A raw row is a line of JSON as bytes, which whoever tokenizes it parses, or values by column. JSON
and CSV are read here, since `datasets` guesses types: it gives the text "2026-11-21" back as a
datetime, and 007 as 7.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lora.data.unpacked import Unpacked, row_given
from lora.shaders.errors import InputError

JSON_ENDINGS = (".jsonl", ".json", ".ndjson")
ENDINGS = {
    **dict.fromkeys(JSON_ENDINGS, "json"),
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
COMPRESSED = (".gz", ".zst")
_ARROW_ROWS = 1024  # that are turned into Python's values at a time
_MOST_LINE = 1 << 26  # bytes of a row
# What is unpacked for one row at most, where it is a whole text, and where all rows are one block.
_MOST_DOCUMENT, _MOST_COLUMNS = 1 << 28, 1 << 30
_BLOCK = 1 << 20
_LARGEST_FIELD = min(sys.maxsize, 2**31 - 1)  # characters of a field of CSV

Row = tuple[int, Any]  # the number under which it is found in its file, and the raw row


@dataclass(frozen=True)
class DataFile:
    """A file of rows.

    Attributes:
        path: where it is.
        name: what users call it; its ending says what it is (the hub's cache has other names).
        sample_by: what a row of plain text is: paragraph, line or document.
    """

    path: Path
    name: str
    sample_by: str = "paragraph"

    @property
    def ending(self) -> str:
        """`.jsonl` of `train.jsonl.gz`; "" where it says nothing."""
        suffixes = [suffix.lower() for suffix in Path(self.name).suffixes]
        if suffixes and suffixes[-1] in COMPRESSED:
            suffixes.pop()
        return suffixes[-1] if suffixes else ""

    @property
    def _compression(self) -> str:
        suffix = Path(self.name).suffix.lower()
        return suffix if suffix in COMPRESSED else ""

    @property
    def kind(self) -> str:
        """json, csv, parquet, arrow or text.

        Raises:
            InputError: neither its ending nor its beginning says what it is.
        """
        kind = ENDINGS.get(self.ending)
        if kind not in (None, "text") or self.path.is_dir():
            return kind or "json"
        with self._reading(), self._opened() as file:  # JSONL has been read from any name
            begins = file.read(_BLOCK).removeprefix(codecs.BOM_UTF8).lstrip()
        if begins[:1] == b"{" and _is_object(begins.split(b"\n", 1)[0]):
            return "json"
        if kind is None:
            known = ", ".join(ENDINGS)
            raise InputError(
                f"{self.name}: its ending says nothing about what it holds; known are {known}, "
                "each also with .gz or .zst behind it."
            )
        return kind

    def check(self) -> None:
        """Refuses what can't be read, without reading it.

        Raises:
            InputError: it isn't there, or nothing says what it is.
        """
        if not self.path.exists():
            raise InputError(f"{self.name}: there is no such file (data.train, data.eval).")
        self.label(self.kind)

    @property
    def is_pieces(self) -> bool:
        """Whether its rows are pieces of one text, which goes on behind each."""
        return self.kind == "text" and self.sample_by != "document"

    def label(self, kind: str) -> str:
        """What stands before a row's number: `data/train.jsonl, line`."""
        if kind == "json":
            kind = "array" if self._is_array() else "json"
        words = {"json": "line", "csv": "line", "text": "line", "array": "item"}
        return f"{self.name}, {words.get(kind, 'row')}"

    def rows(self) -> Iterator[Row]:
        """All rows.

        Raises:
            InputError: the file can't be read, or isn't what its ending says.
        """
        kind = self.kind
        with self._reading():
            if kind == "json":
                yield from self._array() if self._is_array() else self._lines()
            elif kind == "csv":
                yield from self._csv()
            elif kind == "text":
                yield from self._text()
            else:
                yield from self._arrow(kind)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise InputError(
                f"{self.name}: there is no such file (data.train, data.eval)."
            ) from None
        except gzip.BadGzipFile as error:
            raise InputError(f"{self.name}: not what .gz says ({error}).") from None
        except EOFError:
            raise InputError(f"{self.name}: the compressed file ends too early.") from None
        except UnicodeDecodeError:
            raise InputError(f"{self.name}: not text in UTF-8.") from None
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split())[:200]
            raise InputError(f"{self.name}: cannot be read ({reason}).") from error

    def _opened(self, most: int | None = None) -> IO[bytes]:
        """The contents, decompressed; `row_given` after each row, or the file is refused.

        Args:
            most: bytes that a row may take; by default those of a line.
        """
        most = _MOST_LINE if most is None else most
        if self._compression == ".gz":
            return io.BufferedReader(Unpacked(gzip.open(self.path, "rb"), self.name, most))
        if self._compression == ".zst":
            import pyarrow

            stream = pyarrow.input_stream(str(self.path), compression="zstd")
            return io.BufferedReader(Unpacked(stream, self.name, most))
        return open(self.path, "rb")

    def _as_text(self) -> io.TextIOWrapper:
        # utf-8-sig: some editors put a byte order mark before the first line.
        return io.TextIOWrapper(self._opened(), encoding="utf-8-sig", newline="")

    def _is_array(self) -> bool:
        with self._reading(), self._opened() as file:
            begins = file.read(_BLOCK).removeprefix(codecs.BOM_UTF8).lstrip()
        if begins[:1] != b"[":
            return False
        first = begins.split(b"\n", 1)[0].strip()
        try:
            values = json.loads(first)
        except (ValueError, RecursionError):
            # A file that is one line is decided by its first item alone.
            return first == b"[" or first[1:].lstrip()[:1] == b"{" or self.ending == ".json"
        return self.ending == ".json" or not values or isinstance(values[0], dict)

    def _lines(self) -> Iterator[Row]:
        """Lines of JSON, not parsed. Not splitlines(): strings may hold U+2028, which ends one."""
        with self._opened() as file:
            n_before, rest = 0, b""
            while block := file.read(_BLOCK):
                *lines, rest = (rest + block).split(b"\n")
                for number, line in enumerate(lines, n_before + 1):
                    if line.strip():
                        yield number, line
                if lines:
                    row_given(file)
                n_before += len(lines)
                if len(rest) > _MOST_LINE:
                    raise InputError(
                        f"{self.name}, line {n_before + 1}: longer than {_MOST_LINE >> 20} MiB, "
                        "which no row is; the file is damaged, or no lines of JSON."
                    )
            if rest.strip():
                yield n_before + 1, rest

    def _array(self) -> Iterator[Row]:
        """The items of a JSON array, without holding all of it."""
        decoder, number = json.JSONDecoder(), 0
        with self._as_text() as file:
            text, wanted = file.read(_BLOCK), _BLOCK
            position = _skipped(text, 0) + 1  # behind the bracket
            while True:
                position = _skipped(text, position)
                if number and text[position : position + 1] == ",":
                    position = _skipped(text, position + 1)
                if text[position : position + 1] == "]":
                    if text[position + 1 :].strip() or file.read().strip():
                        raise InputError(f"{self.name}: something stands behind the array's end.")
                    return
                after, reason = len(text), "it ends too early"
                try:
                    value, after = decoder.raw_decode(text, position)
                except RecursionError:
                    raise InputError(
                        f"{self.name}, item {number + 1}: nested too deeply."
                    ) from None
                except ValueError as error:
                    reason = getattr(error, "msg", "a number in it is too long")
                if after < len(text):
                    number, position, wanted = number + 1, after, _BLOCK
                    yield number, value
                    row_given(file)
                    continue
                more = file.read(wanted)  # the item may go on there
                if not more:
                    raise InputError(f"{self.name}, item {number + 1}: not JSON ({reason}).")
                text, position, wanted = text[position:] + more, 0, wanted * 2

    def _csv(self) -> Iterator[Row]:
        csv.field_size_limit(_LARGEST_FIELD)
        with self._as_text() as file:
            head = file.readline()
        with self._as_text() as file:
            delimiter = "\t" if self.ending == ".tsv" else ","
            if delimiter == "," and "," not in head and (";" in head or "\t" in head):
                delimiter = ";" if ";" in head else "\t"  # as some spreadsheets write it
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header: list[str] | None = None
            line = 1
            try:
                for fields in reader:
                    if not fields:
                        line = reader.line_num + 1
                        continue
                    if header is None:
                        header = self._header(fields)
                    elif len(fields) != len(header):
                        raise InputError(
                            f"{self.name}, line {line}: has {len(fields)} fields, but the first "
                            f"line names {len(header)} columns."
                        )
                    else:
                        yield line, dict(zip(header, fields, strict=True))
                    line = reader.line_num + 1
                    row_given(file)
            except csv.Error as error:
                raise InputError(f"{self.name}, line {line}: not CSV ({error}).") from None

    def _header(self, fields: list[str]) -> list[str]:
        twice = next((name for i, name in enumerate(fields) if name in fields[:i]), None)
        if twice is not None:
            raise InputError(f"{self.name}, line 1: names the column {twice!r} twice.")
        return fields

    def _text(self) -> Iterator[Row]:
        """Plain text: its paragraphs (between blank lines), its lines, or all of it."""
        most = None if self.is_pieces else _MOST_DOCUMENT
        with io.TextIOWrapper(self._opened(most), encoding="utf-8-sig") as file:
            if self.sample_by == "document":
                text = file.read()
                if text.strip():
                    yield 1, {"text": text}
                return
            lines: list[str] = []
            number = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    lines.append(line)
                if lines and (self.sample_by == "line" or not line.strip()):
                    first = number - len(lines) + (1 if line.strip() else 0)
                    yield first, {"text": "".join(lines).rstrip("\n")}
                    lines = []
                    row_given(file)
            if lines:
                yield number - len(lines) + 1, {"text": "".join(lines).rstrip("\n")}

    def _arrow(self, kind: str) -> Iterator[Row]:
        import pyarrow as pa

        number = 0
        try:
            for batch in self._arrow_batches(kind):
                batch.validate(full=True)  # offsets out of a damaged file would be followed blindly
                for start in range(0, batch.num_rows, _ARROW_ROWS):
                    for values in batch.slice(start, _ARROW_ROWS).to_pylist():
                        yield number, without_none(values)
                        number += 1
        except pa.ArrowInvalid as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{self.name}: not what {self.ending} says ({reason}).") from None

    def _arrow_batches(self, kind: str) -> Iterator[Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._compression:
            with self._opened(_MOST_COLUMNS) as file:
                source: Any = pa.BufferReader(file.read())
        else:
            source = pa.memory_map(str(self.path))
        with source:
            if kind == "parquet":
                yield from pq.ParquetFile(source).iter_batches(batch_size=_ARROW_ROWS)
                return
            try:  # the format of files; `datasets` writes that of streams
                reader = pa.ipc.open_file(source)
            except pa.ArrowInvalid:
                source.seek(0)
                yield from pa.ipc.open_stream(source)
                return
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)


def parsed_line(line: bytes) -> Any:
    """What a line of JSON says.

    Raises:
        InputError: it is no JSON.
    """
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError("not text in UTF-8.") from None
    except RecursionError:
        raise InputError("nested too deeply.") from None
    except ValueError as error:  # besides JSONDecodeError: of numbers with thousands of digits
        reason = getattr(error, "msg", "a number in it is too long")
        raise InputError(f"not JSON ({reason}); each line is one object.") from None


def without_none(value: Any) -> Any:
    """Drops keys that are None: Arrow gives every message every key that any message has."""
    if isinstance(value, dict):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_none(inner) for inner in value]
    return value


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _skipped(text: str, position: int) -> int:
    """Where the next character stands that is no white space of JSON."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
