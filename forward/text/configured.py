"""What the files beside a tokenizer.json say: tokenizer_config.json, chat_template.jinja."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora.shaders.errors import InputError
from lora.shaders.untrusted import read_json_object, read_text, shown

_MOST_CONFIG_BYTES = 1 << 24  # of a tokenizer_config.json: 1 MB for 6,000 added tokens
_MOST_TEMPLATE_BYTES = 1 << 20  # the longest known chat template has 20 KB


def read_config(file: Path) -> dict[str, Any]:
    """A tokenizer_config.json; nothing where there is none.

    Raises:
        InputError: it is no JSON object, or too large.
    """
    return read_json_object(file, _MOST_CONFIG_BYTES) if file.is_file() else {}


def configured_text(config: dict[str, Any], key: str) -> str | None:
    """A token's text, which stands there as it is or in an object; None where it doesn't."""
    value = config.get(key)
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def configured_id(ids: dict[str, int], key: str, text: str | None) -> int | None:
    """The id of a named token.

    Raises:
        InputError: the tokenizer has none of that text.
    """
    if text is None:
        return None
    if text not in ids:
        raise InputError(f"tokenizer_config.json names the {key} {shown(text)}, no token of it.")
    return ids[text]


def configured_templates(folder: Path, config: dict[str, Any]) -> tuple[str | None, str | None]:
    """The chat template, and that for chats with tools where there is another one."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        beside = folder / "additional_chat_templates" / "tool_use.jinja"
        return read_template(file), read_template(beside) if beside.is_file() else None
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates; transformers takes these two
        named = {
            e["name"]: e.get("template")
            for e in template
            if isinstance(e, dict) and isinstance(e.get("name"), str)
        }
        found = named.get("default"), named.get("tool_use")
    else:
        found = template, None
    first, second = (one if isinstance(one, str) else None for one in found)
    return first, second


def read_template(file: Path) -> str:
    """The text of a file that holds a chat template.

    Raises:
        InputError: it can't be read, or is no text.
    """
    return read_text(file, _MOST_TEMPLATE_BYTES, "not text in UTF-8; a chat template is")
