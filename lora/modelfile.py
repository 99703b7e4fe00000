"""Modelfiles: what `ollama create NAME -f Modelfile` reads."""

from __future__ import annotations

import os
from pathlib import Path

_FIRST_LINE = "# Written by lora export."


def modelfile_of_merged(gguf: Path) -> str:
    """The Modelfile of a merged GGUF that lies beside it."""
    return f"{_FIRST_LINE}\nFROM {_quoted(f'./{gguf.name}')}\n"


def modelfile_of_adapter(adapter: Path, base: str, base_path: Path) -> str:
    """The Modelfile of a base with a GGUF adapter that lies beside the Modelfile.

    Args:
        adapter: the GGUF adapter.
        base: as the user names it; an Ollama model keeps its name.
        base_path: its file.
    """
    name = base.removeprefix("ollama:")
    source = name if name != base else _quoted(os.path.abspath(base_path))
    return (
        f"{_FIRST_LINE} Where `ollama create` refuses ADAPTER, make one file\n"
        "# of base and adapter: lora export DIR --to merged-gguf\n"
        f"FROM {source}\nADAPTER {_quoted(f'./{adapter.name}')}\n"
    )


def may_replace(path: Path) -> bool:
    """Whether there is no Modelfile, or one that was written here."""
    if not os.path.lexists(path):
        return True
    return path.is_file() and path.read_bytes().startswith(_FIRST_LINE.encode())


def _quoted(path: str) -> str:
    return f'"{path}"' if any(character.isspace() for character in path) else path
