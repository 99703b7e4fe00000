"""Records: rows in the form of one of four formats, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora.data.shapes import Shape
from lora.data.values import FORMATS, check_object, names_of, parsed_json, short, text_of
from lora.shaders.errors import InputError

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
_KNOWN = frozenset(_MEANINGFUL)


@dataclass(frozen=True)
class Record:
    """One record of a data set, which users know as a row.

    Attributes:
        columns: what its format reads, without what is null or empty: strings, or for chat
            `messages`, a list of mappings with `role` and mostly `content`.
        ignored: the names of its columns that carry no meaning here, such as id or source.
    """

    columns: dict[str, Any]
    ignored: tuple[str, ...] = ()


def check_record(values: Any, shape: Shape, train_on: str = "completion") -> Record:
    """A row in the form of its format, all of it checked.

    Args:
        values: by column.
        shape: of the rows of its source.
        train_on: data.train_on.

    Raises:
        InputError: the row is wrong; doesn't say where it stands.
    """
    check_object(values)
    lacking = [shape.given(name) for name in shape.required if shape.given(name) not in values]
    if lacking:
        raise InputError(
            f"lacks {', '.join(lacking)}, which the format {shape.data_format} needs; its "
            f"columns are {names_of(values)}."
        )
    data_format = shape.data_format
    known = shape.known(values, train_on)
    columns = {column: known[column] for column in FORMATS[data_format]}
    allowed = _OPTIONAL_COLUMNS[data_format]
    for column in (*allowed, *_MEANINGFUL):
        if column not in known or column in columns:
            continue
        value = known[column]
        if value is None or value in ("", [], {}):
            continue
        if column not in allowed:
            raise InputError(
                f"{column} is {short(value)}, and rows of the format {data_format} have "
                f"no place for it; {_elsewhere(column, data_format)}"
            )
        columns[column] = value
    for column, value in columns.items():
        _CHECKS.get(column, _check_text)(value, shape.given(column))
    ignored = tuple(n for n in known if n not in columns and n not in allowed and n not in _KNOWN)
    return Record(columns, ignored)


def _elsewhere(column: str, data_format: str) -> str:
    """Where a column's content may go instead."""
    if column in _MEDIA:
        return "this version trains on text alone: leave the row out."
    if data_format in ("completion", "text"):
        return "write it as it shall stand in the text, or write the row as messages."
    if column in ("tool_calls", "function_call", "reasoning_content"):
        return "it belongs to a message of the assistant, in messages."
    return "give functions as tools." if column == "functions" else "leave it out."


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
