"""Modelfiles: what `ollama create NAME -f Modelfile` reads."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora.adapters.origin import PromptForm
from lora.shaders.errors import InputError
from lora.storage.ollama import OllamaSettings

_FIRST_LINE = "# Written by lora export."

# Each kind of export has its own, so that neither replaces the other's.
OF_ADAPTER = "Modelfile"


def name_of_merged(gguf: Path) -> str:
    """The name of the Modelfile of a merged GGUF."""
    return f"{gguf.stem}.Modelfile"


def modelfile_of_merged(
    gguf: Path, prompts: PromptForm | None = None, base: OllamaSettings | None = None
) -> str:
    """The Modelfile of a merged GGUF that lies beside it.

    Args:
        gguf: the merged file.
        prompts: how prompts are written where no chat template is to stand around them.
        base: what Ollama runs the base with, where it is of Ollama's store. The file alone
            doesn't say it.

    Raises:
        InputError: no Modelfile can say a text of the base's.
    """
    lines = [_FIRST_LINE, _from(gguf)]
    if prompts is not None:
        lines.append(_plain_template(prompts))
    elif base is not None:
        lines += [
            f"{instruction} {_text(text, instruction)}"
            for instruction, text in (("TEMPLATE", base.template), ("SYSTEM", base.system))
            if text is not None
        ]
    if base is not None:
        lines += _parameters(base.parameters)
    return "\n".join(lines) + "\n"


def modelfile_of_adapter(
    adapter: Path, base: str, base_path: Path, prompts: PromptForm | None = None
) -> str:
    """The Modelfile of a base with a GGUF adapter that lies beside the Modelfile.

    Args:
        adapter: the GGUF adapter.
        base: as the user names it; an Ollama model keeps its name, and brings its settings.
        base_path: its file.
        prompts: how prompts are written where no chat template is to stand around them.
    """
    template = "" if prompts is None else f"{_plain_template(prompts)}\n"
    name = base.removeprefix("ollama:")
    source = name if name != base else _quoted(os.path.abspath(base_path))
    return (
        f"{_FIRST_LINE} Where `ollama create` refuses ADAPTER, make one file\n"
        "# of base and adapter: lora export DIR --to merged-gguf\n"
        f"FROM {source}\n{_adapter(adapter)}\n{template}"
    )


def may_replace(path: Path, gguf: Path) -> bool:
    """Whether there is no Modelfile, or one that was written here for the same GGUF."""
    if not os.path.lexists(path):
        return True
    if not path.is_file():
        return False
    try:
        first, *others = path.read_bytes().split(b"\n")
    except OSError:
        return False
    return first.startswith(_FIRST_LINE.encode()) and any(
        line.encode() in others for line in (_from(gguf), _adapter(gguf))
    )


def _from(gguf: Path) -> str:
    return f"FROM {_quoted(f'./{gguf.name}')}"


def _adapter(gguf: Path) -> str:
    return f"ADAPTER {_quoted(f'./{gguf.name}')}"


def _quoted(path: str) -> str:
    return f'"{path}"' if any(character.isspace() for character in path) else path


def _plain_template(prompts: PromptForm) -> str:
    """Hands a prompt on, and ends it as every prompt of the training data ends.

    At Ollama's own prompt nobody can type a line break at the end, and without it the quickstart's
    model answers 1 of 16 calls rightly, with it 13 (by llama.cpp).
    """
    return f'TEMPLATE """{{{{ .Prompt }}}}{prompts.ending}"""'


def _parameters(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if not re.fullmatch(r"[A-Za-z0-9_]+", name):  # nothing else ends where a value begins
            continue
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str):
                yield f"PARAMETER {name} {_text(one, name)}"
            elif isinstance(one, bool | int | float):
                yield f"PARAMETER {name} {json.dumps(one)}"


def _text(text: str, what: str) -> str:
    """A text in quotes. Ollama knows no escapes: three quotes at the end of a line are the end."""
    if re.search(r'"""\s*[\r\n]', text):
        raise InputError(
            f"The base's {what} in Ollama's store has three quotes at the end of a line, which no "
            "Modelfile can hold; name the base by the path of its GGUF, with --base."
        )
    quotes = '"""' if re.search(r'["\r\n]', text) or what.isupper() else '"'
    return quotes + text + quotes
