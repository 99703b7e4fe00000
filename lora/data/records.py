"""Records (rows) of a data set: read, checked, each with the place where a user finds it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora.shaders.errors import InputError

# The first format all of whose columns are there is the one that auto takes.
FORMATS: dict[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "instruct": ("instruction", "output"),
    "text": ("text",),
}
_OPTIONAL_COLUMNS = {"instruct": ("input",)}
_FILE_ENDINGS = (".jsonl", ".json", ".ndjson", ".txt")


@dataclass(frozen=True)
class Record:
    """One record of a data set, which users know as a row.

    Attributes:
        columns: what its format reads: strings, or for chat `messages`, a list of mappings with
            `role` and `content`.
        place: where it is, for errors: `data/train.jsonl, line 3`.
    """

    columns: dict[str, Any]
    place: str


def load_records(
    source: str | Sequence[str], data_format: str = "auto", split: str = "train"
) -> tuple[str, list[Record]]:
    """Reads a whole data set.

    Args:
        source: a JSONL file, several, or a Hugging Face data set (its name, or a directory with
            one), which the `datasets` package loads.
        data_format: chat, completion, instruct, text; or auto, by the first row's columns.
        split: which split of a Hugging Face data set: `train`, or `eval` for its validation (or
            test) split.

    Returns:
        the format, and the records in their order.

    Raises:
        InputError: a file is missing or empty, or a row is wrong; says the file and the line.
    """
    sources = [source] if isinstance(source, str) else list(source)
    raw: list[tuple[Any, str]] = []
    for name in sources:
        n_before = len(raw)
        raw += _read_file(Path(name)) if is_file_name(name) else _read_data_set(name, split)
        if len(raw) == n_before:
            raise InputError(f"{name}: holds no rows.")
    if data_format == "auto":
        data_format = _detect_format(*raw[0])
    return data_format, [_check_record(values, place, data_format) for values, place in raw]


def is_file_name(name: str) -> bool:
    """Whether `data.train` or `data.eval` names a file by this, and no Hugging Face data set."""
    return Path(name).is_file() or name.endswith(_FILE_ENDINGS)


def _read_file(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        # Not splitlines(): JSON strings may hold U+2028, which ends a line there.
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file (data.train, data.eval).") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            # utf-8-sig: some editors put a byte order mark before the first line.
            values = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise InputError(f"{place}: not text in UTF-8.") from None
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise InputError(f"{place}: not JSON ({reason}); each line is one object.") from None
        yield values, place


def _read_data_set(name: str, split: str) -> Iterator[tuple[Any, str]]:
    """Rows of a Hugging Face data set, with the empty fields that Arrow puts in left out."""
    # Imported here: it takes a second, and training from a file has no need of it.
    import datasets

    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # the hub, the network, the builders: anything comes out of it
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{name}: there is no such file, and as a Hugging Face data set it cannot be loaded: "
            f"{reason[:300]}"
        ) from error
    wanted = ("train",) if split == "train" else ("validation", "valid", "test")
    found = next((splits[one] for one in wanted if one in splits), None)
    if found is None:
        raise InputError(
            f"{name}: the data set has no {' or '.join(wanted)} split; it has {', '.join(splits)}."
        )
    for index, values in enumerate(found):
        yield _without_none(values), f"{name}, row {index}"


def _without_none(value: Any) -> Any:
    """Drops keys that are None: Arrow gives every message every key that any message has."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value


def _detect_format(values: Any, place: str) -> str:
    _check_object(values, place)
    for name, columns in FORMATS.items():
        if all(column in values for column in columns):
            return name
    known = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in FORMATS.items())
    raise InputError(
        f"{place}: the columns are {_names(values)}, which is no known format ({known})."
    )


def _check_record(values: Any, place: str, data_format: str) -> Record:
    _check_object(values, place)
    required = FORMATS[data_format]
    lacking = [column for column in required if column not in values]
    if lacking:
        raise InputError(
            f"{place}: lacks {', '.join(lacking)}, which the format {data_format} needs; its "
            f"columns are {_names(values)}."
        )
    columns = {}
    for column in (*required, *_OPTIONAL_COLUMNS.get(data_format, ())):
        if column in required or values.get(column) is not None:
            check = _check_messages if column == "messages" else _check_text
            check(values[column], f"{place}: {column}")
            columns[column] = values[column]
    return Record(columns, place)


def _check_object(values: Any, place: str) -> None:
    if not isinstance(values, Mapping):
        raise InputError(f"{place}: got {_short(values)}; each row is an object with columns.")


def _check_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise InputError(f"{where} is {_short(value)}; it must be a string.")


def _check_messages(value: Any, where: str) -> None:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where} is {_short(value)}; it must be a list of messages.")
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(
                f"{where}[{index}] is {_short(message)}; a message is an object with role and "
                "content."
            )
        # A call of a tool may come without content.
        if "tool_calls" not in message and not isinstance(message.get("content"), str):
            content = _short(message.get("content"))
            raise InputError(f"{where}[{index}].content is {content}; it must be a string.")


def _names(values: Mapping[str, Any]) -> str:
    return ", ".join(values) or "none"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
