"""Chat templates of many models, and chats of every kind for them.

The templates are files of TRL's package (the `parity` extra), which isn't imported for them; that
of Mistral, which TRL lacks, is written down here.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# As Mistral 7B v0.3's: the system message goes into the last question, tools before it.
MISTRAL = """{{ bos_token }}
{%- if messages[0].role == "system" %}
    {%- set system = messages[0].content %}{%- set talk = messages[1:] %}
{%- else %}{%- set talk = messages %}{%- endif %}
{%- set users = talk | selectattr("role", "equalto", "user") | list %}
{%- for m in talk %}
    {%- if m.role == "user" %}
        {%- if tools and m == users[-1] %}{{ "[AVAILABLE_TOOLS] " + tools|tojson }}
            {{- "[/AVAILABLE_TOOLS]" }}{%- endif %}
        {%- if loop.last and system is defined %}{{ "[INST] " + system + "\n\n" + m.content }}
            {{- "[/INST]" }}
        {%- else %}{{ "[INST] " + m.content + "[/INST]" }}{%- endif %}
    {%- elif m.tool_calls %}{{ "[TOOL_CALLS] [" }}
        {%- for call in m.tool_calls %}{{ call.function|tojson }}{%- endfor %}{{ "]" + eos_token }}
    {%- elif m.role == "assistant" %}{{ " " + m.content|trim + eos_token }}
    {%- elif m.role == "tool" %}{{ "[TOOL_RESULTS] " + {"content": m.content}|tojson }}
        {{- "[/TOOL_RESULTS]" }}
    {%- endif %}
{%- endfor %}"""

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where."}},
            "required": ["city"],
        },
    },
}


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _says(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def _calls() -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"city": "Bern"}}
    return _says("", tool_calls=[{"type": "function", "id": "a1b2c3d4e", "function": function}])


_RESULT = {"role": "tool", "name": "weather", "tool_call_id": "a1b2c3d4e", "content": "12 degrees"}
_ASKED = _user("Weather in Bern?")
_THINKS = [
    _user("Why?"),
    _says("Because.", reasoning_content="Think first."),
    _user("So?"),
    _says("So.", reasoning_content="Think again."),
]
_TALK = [_user("How are you?"), _says("Fine, thanks."), _user("And now?"), _says("Still fine.")]

# Rows of the format chat, by what is in them.
CASES: dict[str, dict[str, Any]] = {
    "one": {"messages": _TALK[:2]},
    "several": {"messages": _TALK},
    "system": {"messages": [{"role": "system", "content": "Be terse."}, *_TALK]},
    "reasoning": {"messages": _THINKS},
    "tools": {"messages": [_ASKED, _calls()], "tools": [TOOL]},
    "calls": {"messages": [_ASKED, _calls()]},
    "results": {
        "messages": [_ASKED, _calls(), _RESULT, _says("It is cold."), *_TALK[:2]],
        "tools": [TOOL],
    },
}


@cache
def templates() -> dict[str, str]:
    """Every template by its name, such as qwen3; those for training end with _training."""
    found = find_spec("trl")
    folders = (found.submodule_search_locations or []) if found is not None else []
    files = (file for folder in folders for file in Path(folder, "chat_templates").glob("*.jinja"))
    return {"mistral": MISTRAL} | {file.stem: file.read_text() for file in sorted(files)}
