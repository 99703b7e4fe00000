"""Shapes of rows: which columns hold what, and how they become one of the four formats.

A shape is found by the first row of a source, and holds for all of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lora.data.values import FORMATS, check_object, names_of, parsed_json, short
from lora.shaders.errors import InputError

# ShareGPT's names for who speaks, and what else is used for them.
_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "function_response", "observation"), "tool"),
    "system": "system",
    "developer": "developer",
}
_CALL = "function_call"  # who "says" the call of a function
_READ_AS_JSON = ("messages", "history", "weight", "train", "chat_template_kwargs")


@dataclass(frozen=True)
class Shape:
    """Where a format's columns are in a source's rows.

    Attributes:
        data_format: chat, completion, instruct or text.
        columns: names here to the names that the rows have; where they differ.
        turns: the messages are prompt and completion, each a list of them.
        speakers: messages are renamed and those who speak get the usual names, as ShareGPT's.
        role, content: what messages call these.
    """

    data_format: str
    columns: Mapping[str, str] = field(default_factory=dict)
    turns: bool = False
    speakers: bool = False
    role: str = "role"
    content: str = "content"

    @property
    def required(self) -> tuple[str, ...]:
        """The columns that each row has, by their names here."""
        return ("prompt", "completion") if self.turns else FORMATS[self.data_format]

    def given(self, column: str) -> str:
        """What the rows call a column."""
        return self.columns.get(column, column)

    def known(self, values: Mapping[str, Any], train_on: str) -> dict[str, Any]:
        """A row's columns by their names here, messages in the usual form.

        Raises:
            InputError: messages are not in the form of the source's first row.
        """
        known = dict(values)
        if self.columns:
            renamed = set(self.columns.values()) | set(self.columns)
            known = {name: value for name, value in values.items() if name not in renamed}
            known |= {here: values[name] for here, name in self.columns.items() if name in values}
        for column in _READ_AS_JSON:  # tables hold nested values, and numbers, as text
            if column in known and isinstance(known[column], str):
                known[column] = parsed_json(known[column])
        if self.turns:
            asked = [_untrained(m, train_on) for m in _messages(known.pop("prompt"), "prompt")]
            said = _messages(known.pop("completion"), self.given("completion"))
            known["messages"] = [*asked, *said]
        if (self.speakers or self.renames_messages) and isinstance(known.get("messages"), list):
            name = self.given("messages")
            known["messages"] = [
                self._message(message, f"{name}[{index}]")
                for index, message in enumerate(known["messages"])
            ]
        return known

    @property
    def renames_messages(self) -> bool:
        """Whether messages have other names for role and content."""
        return (self.role, self.content) != ("role", "content")

    def _message(self, message: Any, where: str) -> Any:
        """A message with role and content; what is none is returned as it is, to be refused."""
        if not isinstance(message, dict):
            return message
        # ShareGPT's own names, or the usual ones, as its cleaned copies have.
        names = {self.role: "role", self.content: "content"}
        if self.speakers and not self.renames_messages:
            names = {"from": "role", "value": "content"}
        items: list[tuple[str, Any]] = list(message.items())
        known = {names.get(name, name): value for name, value in items}
        role = known.get("role")
        if role == _CALL:
            return _call(known, where)
        if isinstance(role, str) and role.lower() in _ROLES:
            known["role"] = _ROLES[role.lower()]
        elif self.speakers:
            raise InputError(
                f"{where} is said by {short(role)}; known are {', '.join(_ROLES)}, {_CALL}."
            )
        return known


# By the first row whose columns are all there; those without a name of their own first.
_KNOWN = (
    *(Shape(name) for name in FORMATS),
    Shape("chat", {"messages": "conversations"}, speakers=True),  # ShareGPT
    Shape("chat", {"messages": "conversation"}, speakers=True),
    Shape("instruct", {"output": "response", "input": "context"}),  # Dolly
    Shape("instruct", {"instruction": "prompt", "output": "response"}),
    Shape("instruct", {"instruction": "question", "output": "answer"}),
    Shape("instruct", {"instruction": "input", "output": "output", "input": ""}),
)
# Where the format is given.
_ASKED_FOR = (
    Shape("completion", {"completion": "response"}),
    Shape("completion", {"prompt": "question", "completion": "answer"}),
    Shape("completion", {"prompt": "input", "completion": "output"}),
    Shape("completion", {"prompt": "instruction", "completion": "output"}),
)


def shape_of(values: Any, data_format: str, columns: Mapping[str, str]) -> Shape:
    """The shape of a source's rows.

    Args:
        values: its first row.
        data_format: the one that it must be of; auto for any.
        columns: names here to the names that the rows have, as the user maps them.

    Raises:
        InputError: it is no shape that is known; pairs of answers, one preferred, are named.
    """
    check_object(values)
    role, content = columns.get("role", "role"), columns.get("content", "content")
    mapped = {here: name for here, name in columns.items() if here not in ("role", "content")}
    absent = [name for name in mapped.values() if name not in values]
    if absent:
        raise InputError(
            f"lacks the column {absent[0]}, which data.columns names; its columns are "
            f"{names_of(values)}."
        )
    if data_format == "auto":
        shapes = _KNOWN
    else:
        shapes = tuple(s for s in (*_KNOWN, *_ASKED_FOR) if s.data_format == data_format)
    candidates = [
        Shape(s.data_format, {**s.columns, **mapped}, False, s.speakers, role, content)
        for s in shapes
    ]
    fitting = [s for s in candidates if all(s.given(name) in values for name in s.required)]
    # Of several the one of whose columns the user named some.
    named = [s for s in fitting if any(name in mapped for name in s.required)]
    if named or fitting:
        return _completed((named or fitting)[0], values, data_format)
    if data_format == "chat" and "prompt" in values and "completion" in values:
        return Shape("chat", mapped, True, False, role, content)
    if "chosen" in values and "rejected" in values:
        raise InputError(
            "has the columns chosen and rejected: pairs of answers, one of which is preferred, "
            "are not supported yet. To train on the chosen answers alone, name them: "
            f"{_chosen(values)}."
        )
    if data_format != "auto":
        return Shape(data_format, mapped, role=role, content=content)  # each row says what it lacks
    known = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in FORMATS.items())
    raise InputError(
        f"the columns are {names_of(values)}, which is no known format ({known}). Say which is "
        "which with data.columns, such as columns: {prompt: question, completion: answer}."
    )


def _completed(shape: Shape, values: Mapping[str, Any], data_format: str) -> Shape:
    """A shape with what only the values show: lists of messages, ShareGPT's names in messages."""
    if shape.data_format == "chat" and "messages" in shape.columns:
        messages = parsed_json(values[shape.given("messages")])
        if _is_messages(messages) and messages and {"from", "value"} <= messages[0].keys():
            return replace(shape, speakers=True)
    if shape.data_format != "completion" or data_format not in ("auto", "completion"):
        return shape
    if not all(_is_messages(values[shape.given(name)]) for name in shape.required):
        return shape
    return replace(shape, data_format="chat", turns=True)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def _messages(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(
            f"{name} is {short(value)}; it must be a list of messages, as in the first row."
        )
    return value


def _untrained(message: Any, train_on: str) -> Any:
    """A message of a prompt, which is not trained, whoever says it."""
    if train_on == "all" or not isinstance(message, dict):
        return message
    return {**message, "train": False}


def _call(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A call of a function that ShareGPT writes as a message of its own."""
    call = parsed_json(message.get("content"))
    if not isinstance(call, dict) or "name" not in call:
        raise InputError(
            f"{where} is {short(message.get('content'))}; a call is an object with name and "
            "arguments."
        )
    rest = {k: v for k, v in message.items() if k not in ("role", "content")}
    function = {"name": call["name"], "arguments": call.get("arguments", {})}
    calls = [{"type": "function", "function": function}]
    return {**rest, "role": "assistant", "content": "", "tool_calls": calls}


def _chosen(values: Mapping[str, Any]) -> str:
    if isinstance(values["chosen"], list) and not isinstance(values.get("prompt"), list):
        return "columns: {messages: chosen}"
    if "prompt" in values:
        return "columns: {prompt: prompt, completion: chosen}"
    return "columns: {text: chosen}"
