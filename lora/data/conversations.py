"""Records as conversations: messages, tools and template variables in one form, whatever theirs.

Calls of tools have arguments that are objects, thoughts have the names that templates read, and
what says whether a message is trained stands beside the messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora.data.records import REASONING
from lora.data.values import parsed_json, text_of
from lora.shaders.errors import InputError

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """What a chat template is given for one record.

    Attributes:
        messages: without `weight` and `train`, and without keys that were null.
        wanted: one a message: whether it says itself that it is trained (`train`, `weight` 0);
            None where it doesn't.
        names: one a message: what users call it, `messages[1]` or `instruction`.
        tools: JSON schemas; None for none.
        arguments: `chat_template_kwargs` of the record.
        given_names: what a field of a message was called in the record, where it has another name
            here, by the message's place and the name here.
    """

    messages: list[Message]
    wanted: list[bool | None]
    names: list[str]
    tools: list[dict[str, Any]] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    given_names: Mapping[tuple[int, str], str] = field(default_factory=dict)

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms in which a template may read it, the commonest first."""
        called = any(message.get("tool_calls") for message in self.messages)
        return _FORMS if called else tuple(form for form in _FORMS if not form.of_calls)

    def in_form(self, form: Form) -> list[Message]:
        """The messages as one kind of template reads them."""
        return [in_form(message, form) for message in self.messages]


@dataclass(frozen=True)
class Form:
    """How a template reads messages; llama.cpp tries the same things.

    Attributes:
        arguments_as_text: arguments of calls are the text of their JSON, which the template joins
            to its own (DeepSeek's); else they are objects.
        null_content: a call without content has null for it, by which the template knows calls
            (DeepSeek R1's); else "".
        content_as_parts: content is a list of one part, {"type": "text", "text": …} (templates of
            models that see); else a string.
    """

    arguments_as_text: bool = False
    null_content: bool = False
    content_as_parts: bool = False

    @property
    def of_calls(self) -> bool:
        """Whether it differs from the commonest for calls of tools alone."""
        return self.arguments_as_text or self.null_content


_FORMS = (Form(), Form(True), Form(False, True), Form(True, True), Form(content_as_parts=True))


def conversation_of(columns: Mapping[str, Any], data_format: str) -> Conversation:
    """The conversation in a record's columns.

    Args:
        columns: of a checked record.
        data_format: chat, or instruct: a system message, the history, the question, the answer.

    Raises:
        InputError: the record has a system message twice.
    """
    if data_format == "chat":
        given = list(columns["messages"])
        names = [f"messages[{index}]" for index in range(len(given))]
    else:
        given, names = [], []
        for index, (question, answer) in enumerate(columns.get("history", [])):
            given += _exchange(question, answer)
            names += [f"history[{index}][0]", f"history[{index}][1]"]
        given += _exchange("\n\n".join(instruction_parts(columns)), columns["output"])
        names += ["instruction", "output"]
    if "system" in columns:
        if given[0]["role"] in ("system", "developer"):
            raise InputError(
                "The row has the column system, and its messages begin with a system message; keep "
                "one of them."
            )
        given.insert(0, {"role": "system", "content": columns["system"]})
        names.insert(0, "system")
    tools = parsed_json(columns.get("tools"))
    return Conversation(
        [_normal(message) for message in given],
        [_wanted(message) for message in given],
        names,
        tools or None,
        columns.get("chat_template_kwargs", {}),
        {(i, here): name for i, message in enumerate(given) for here, name in _renamed(message)},
    )


def instruction_parts(columns: Mapping[str, Any]) -> list[str]:
    """The instruction, and the input where it isn't empty (Alpaca writes "" for none)."""
    return [part for part in (columns["instruction"], columns.get("input")) if part]


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _wanted(message: Mapping[str, Any]) -> bool | None:
    """Whether a message asks to be trained; a weight of 1 only says what holds anyway."""
    train, weight = message.get("train"), message.get("weight")
    if train is not None:
        return bool(train)
    return False if weight == 0 else None


def _normal(message: Mapping[str, Any]) -> Message:
    kept = {k: v for k, v in message.items() if v is not None and k not in ("weight", "train")}
    call = kept.pop("function_call", None)
    if call:
        kept["tool_calls"] = [{"type": "function", "function": call}]
    if kept.get("tool_calls"):
        kept["tool_calls"] = [_normal_call(call) for call in kept["tool_calls"]]
    # As transformers does: templates read the first name, gpt-oss's the last.
    reasoning = next((kept[name] for name in REASONING if name in kept), None)
    if reasoning is not None:
        kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
    kept["content"] = text_of(kept.get("content", ""))
    return kept


def _renamed(message: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name here, name in the record) of the fields that get another one."""
    if message.get("function_call"):
        yield "tool_calls", "function_call"
    reasoning = next((name for name in REASONING if message.get(name) is not None), None)
    if reasoning is not None:
        yield "reasoning_content", reasoning


def _normal_call(call: Mapping[str, Any]) -> dict[str, Any]:
    inner = call.get("function", call)
    function = {key: value for key, value in inner.items() if value is not None}
    function["arguments"] = parsed_json(function.get("arguments")) or {}
    outer = {k: v for k, v in call.items() if v is not None} if "function" in call else {}
    return {"type": "function", **outer, "function": function}


def in_form(message: Message, form: Form) -> Message:
    """A message as one kind of template reads it."""
    if form.content_as_parts:
        return {**message, "content": [{"type": "text", "text": message["content"]}]}
    calls: Sequence[Mapping[str, Any]] = message.get("tool_calls", [])
    if not calls:
        return message
    if form.arguments_as_text:
        calls = [
            {**call, "function": {**call["function"], "arguments": _json(call)}} for call in calls
        ]
    content = message["content"] or (None if form.null_content else "")
    return {**message, "content": content, "tool_calls": list(calls)}


def _json(call: Mapping[str, Any]) -> str:
    return json.dumps(call["function"]["arguments"], ensure_ascii=False)
