"""Whether what a row says stands in its rendering: chat templates drop what they don't know.

Looked for is the text of each field. White space doesn't count, since templates trim and indent;
inside JSON a text is escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

_THINKING = re.compile(r"</?think>")


class Shown:
    """A rendering in which texts are looked for.

    Args:
        text: the rendering.
        start: what is looked for ends behind it: what stands before is somebody else's.
    """

    def __init__(self, text: str, start: int = 0) -> None:
        self._given, self._given_start = text, start

    @cached_property
    def _text(self) -> str:
        return _squeezed(self._given)

    @cached_property
    def _start(self) -> int:
        return len(_squeezed(self._given[: self._given_start]))

    def count(self, wanted: str) -> int:
        """How often a text stands in it."""
        return self._text.count(_squeezed(wanted))

    def has(self, wanted: str) -> bool:
        """Whether a text stands in it, as it is or as a string of JSON."""
        as_it_is = wanted.strip()  # white space at its end may reach behind the start alone
        place = self._given.rfind(as_it_is)
        if not as_it_is or (place >= 0 and place + len(as_it_is) > self._given_start):
            return True
        escaped = (json.dumps(wanted, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
        return any(self._ends_behind(_squeezed(form)) for form in (wanted, *escaped))

    def has_content(self, wanted: str) -> bool:
        """The same for a message, whose thoughts a template may set apart from the rest."""
        return self.has(wanted) or all(map(self.has, _THINKING.split(wanted)))

    def _ends_behind(self, wanted: str) -> bool:
        found = self._text.rfind(wanted)
        return not wanted or (found >= 0 and found + len(wanted) > self._start)


def dropped_fields(message: Mapping[str, Any], shown: Shown) -> Iterator[str]:
    """The fields of a message that a rendering doesn't show.

    Args:
        message: in the form of `Conversation.messages`.
        shown: what was rendered for it.
    """
    if not shown.has_content(message["content"]):
        yield "content"
    if not shown.has(message.get("reasoning_content", "")):
        yield "reasoning_content"
    if not all(_shows_call(call["function"], shown) for call in message.get("tool_calls", [])):
        yield "tool_calls"


def _shows_call(function: Mapping[str, Any], shown: Shown) -> bool:
    if not shown.has(function["name"]):
        return False
    arguments = function["arguments"]
    # A template that takes texts writes an object as Python shows it.
    as_python, as_json = repr(arguments), json.dumps(arguments, ensure_ascii=False)
    if as_python != as_json and shown.has(as_python):
        return False
    return all(any(map(shown.has, forms)) for forms in _leaves(arguments))


def _leaves(value: Any) -> Iterator[tuple[str, ...]]:
    """The names and values inside a value, each in the forms in which it may be written."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield (str(name),)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield (value,)
    else:
        yield str(value), json.dumps(value, default=str)


def dropped_tool(tools: Sequence[Mapping[str, Any]], with_them: str, without: str) -> str | None:
    """The name of the first tool that a rendering doesn't show; None where it shows all.

    Args:
        tools: JSON schemas of functions.
        with_them: the rendering that was given the tools.
        without: that of the same messages alone, which may hold the names, too.
    """
    shown, before = Shown(with_them), Shown(without)
    for tool in tools:
        function = tool.get("function", tool)
        name = str(function.get("name", ""))
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        texts = [str(function.get("description") or ""), *(properties or {})]
        if shown.count(name) <= before.count(name) or not all(map(shown.has, texts)):
            return name
    return None


def _squeezed(text: str) -> str:
    return "".join(text.split())
