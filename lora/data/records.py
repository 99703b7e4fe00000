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
# What else a format reads. The rest of what carries meaning is refused, other columns are ignored.
_WEIGHTS = ("weight", "train")
_MEDIA = ("images", "image", "audio", "audios", "videos")
CALLS = ("tool_calls", "function_call")  # of a message: calls of tools, and OpenAI's older form
REASONING = ("reasoning_content", "reasoning", "thinking")  # names of one thing, as transformers
_CHAT = ("system", "tools", "chat_template_kwargs", *_WEIGHTS)
_OPTIONAL_COLUMNS = {
    "chat": _CHAT,
    "completion": _WEIGHTS,
    "instruct": ("input", "history", *_CHAT),
    "text": _WEIGHTS,
}
_MEANINGFUL = (
    *CALLS, "reasoning_content", "system", "history", "tools", "functions", "chat_template_kwargs",
    *_WEIGHTS, *_MEDIA,
)  # fmt: skip
_FILE_ENDINGS = (".jsonl", ".json", ".ndjson", ".txt")


@dataclass(frozen=True)
class Record:
    """One record of a data set, which users know as a row.

    Attributes:
        columns: what its format reads, without what is null or empty: strings, or for chat
            `messages`, a list of mappings with `role` and mostly `content`.
        place: where it is, for errors: `data/train.jsonl, line 3`.
        ignored: the names of its columns that carry no meaning here, such as id or source.
    """

    columns: dict[str, Any]
    place: str
    ignored: tuple[str, ...] = ()


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
        except RecursionError:
            raise InputError(f"{place}: nested too deeply.") from None
        except ValueError as error:  # besides JSONDecodeError: of numbers with thousands of digits
            reason = getattr(error, "msg", "a number in it is too long")
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
    columns = {column: values[column] for column in required}
    allowed = _OPTIONAL_COLUMNS[data_format]
    for column in (*allowed, *_MEANINGFUL):
        value = values.get(column)
        if value is None or value in ("", [], {}) or column in columns:
            continue
        if column not in allowed:
            raise InputError(
                f"{place}: {column} is {short(value)}, and rows of the format {data_format} have "
                f"no place for it; {_elsewhere(column, data_format)}"
            )
        columns[column] = value
    for column, value in columns.items():
        _CHECKS.get(column, _check_text)(value, f"{place}: {column}")
    known = {*columns, *allowed, *_MEANINGFUL}
    return Record(columns, place, tuple(name for name in values if name not in known))


def _elsewhere(column: str, data_format: str) -> str:
    """Where a column's content may go instead."""
    if column in _MEDIA:
        return "this version trains on text alone: leave the row out."
    if data_format in ("completion", "text"):
        return "write it as it shall stand in the text, or write the row as messages."
    if column in ("tool_calls", "function_call", "reasoning_content"):
        return "it belongs to a message of the assistant, in messages."
    return "give functions as tools." if column == "functions" else "leave it out."


def _check_object(values: Any, place: str) -> None:
    if not isinstance(values, Mapping):
        raise InputError(f"{place}: got {short(values)}; each row is an object with columns.")


def _check_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise InputError(f"{where} is {short(value)}; it must be a string.")


def _check_messages(value: Any, where: str) -> None:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where} is {short(value)}; it must be a list of messages.")
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(
                f"{where}[{index}] is {short(message)}; a message is an object with role and "
                "content."
            )
        _check_message(message, f"{where}[{index}]")


def _check_message(message: dict[str, Any], where: str) -> None:
    content = text_of(message.get("content"))
    # Null where a call of a tool, or a thought, is all that is said.
    may_lack = any(message.get(name) for name in (*CALLS, *REASONING))
    if not isinstance(content, str) and not (content is None and may_lack):
        parts = content if isinstance(content, list) else []
        kinds = [part.get("type") for part in parts if isinstance(part, dict)]
        other = next((kind for kind in kinds if kind != "text"), None)
        if other is not None:
            raise InputError(
                f"{where}.content has a part of the type {short(other)}; "
                f"{_elsewhere('images', 'chat')}"
            )
        raise InputError(f"{where}.content is {short(content)}; it must be a string.")
    for name in _MEDIA:
        if message.get(name):
            raise InputError(
                f"{where}.{name} is {short(message[name])}; {_elsewhere(name, 'chat')}"
            )
    for name in REASONING:
        if message.get(name) is not None:
            _check_text(message[name], f"{where}.{name}")
    for name, check in (("weight", _check_weight), ("train", _check_train)):
        if message.get(name) is not None:
            check(message[name], f"{where}.{name}")
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and train is not None and bool(weight) != train:
        raise InputError(f"{where}: weight is {short(weight)}, but train is {short(train)}.")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(map(_is_tool_call, calls))):
        raise InputError(
            f"{where}.tool_calls is {short(calls)}; it must be a list of objects with a function: "
            "its name and its arguments."
        )
    legacy = message.get("function_call")
    if legacy is not None and not _is_call(legacy):
        raise InputError(
            f"{where}.function_call is {short(legacy)}; it must be an object with name and "
            "arguments."
        )
    if calls and legacy:
        raise InputError(f"{where} has tool_calls and function_call; keep one of them.")


def _is_tool_call(value: Any) -> bool:
    return isinstance(value, dict) and _is_call(value.get("function", value))


def _is_call(value: Any) -> bool:
    """Whether it is the call of a function; arguments may be an object or the text of one."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return False
    arguments = value.get("arguments")
    return arguments in (None, "") or isinstance(parsed_json(arguments), dict)


def _check_weight(value: Any, where: str) -> None:
    if isinstance(value, bool) or value not in (0, 1):
        raise InputError(
            f"{where} is {short(value)}; a weight is 0 (not trained) or 1; others are not "
            "supported."
        )


def _check_train(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        raise InputError(f"{where} is {short(value)}; it must be true or false.")


def _check_arguments(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise InputError(f"{where} is {short(value)}; it must be an object of template variables.")


def _check_history(value: Any, where: str) -> None:
    pairs = isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, str) for one in pair)
        for pair in value
    )
    if not pairs:
        raise InputError(
            f"{where} is {short(value)}; it must be a list of [instruction, output], two strings."
        )


def _check_tools(value: Any, where: str) -> None:
    """Data sets of Arrow often hold tools as the text of their JSON; it is parsed later."""
    tools = parsed_json(value)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{where} is {short(value)}; it must be a list of JSON schemas.")


_CHECKS = {
    "messages": _check_messages,
    "weight": _check_weight,
    "train": _check_train,
    "chat_template_kwargs": _check_arguments,
    "history": _check_history,
    "tools": _check_tools,
}


def text_of(content: Any) -> Any:
    """The text of a content that is one part of text, `[{"type": "text", "text": "Hi"}]`.

    Any other is returned as it is: templates join several parts in different ways.
    """
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
        part = {key: value for key, value in content[0].items() if value is not None}
        if part.keys() == {"type", "text"} and part["type"] == "text":
            return part["text"]
    return content


def parsed_json(value: Any) -> Any:
    """What the JSON in a string says; what is no string, or no JSON, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _names(values: Mapping[str, Any]) -> str:
    return ", ".join(values) or "none"


def short(value: Any) -> str:
    """A value as JSON of at most 60 characters, for errors."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
