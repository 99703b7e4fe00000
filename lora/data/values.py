"""Values of rows: what columns a format needs, JSON in texts, and how values stand in errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lora.shaders.errors import InputError

# The first format all of whose columns are there is the one that auto takes.
FORMATS: dict[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "instruct": ("instruction", "output"),
    "text": ("text",),
}


def check_object(values: Any) -> None:
    """Refuses a row that has no columns."""
    if not isinstance(values, Mapping):
        raise InputError(f"got {short(values)}; each row is an object with columns.")


def text_of(content: Any) -> Any:
    """The text of a content that is parts of text, `[{"type": "text", "text": "Hi"}]`.

    Several are joined by line breaks, as llama.cpp does it. Any other content is returned as it is.
    """
    if not isinstance(content, list) or not content:
        return content
    texts = []
    for part in content:
        known = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {}
        if known.keys() != {"type", "text"} or known["type"] != "text":
            return content
        texts.append(known["text"])
    if not all(isinstance(text, str) for text in texts):
        return texts[0] if len(texts) == 1 else content
    return "\n".join(texts)


def parsed_json(value: Any) -> Any:
    """What the JSON in a string says; what is no string, or no JSON, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def names_of(values: Mapping[str, Any]) -> str:
    """A row's columns, for errors."""
    return ", ".join(map(str, values)) or "none"


def short(value: Any) -> str:
    """A value as JSON of at most 60 characters, for errors."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
