"""Modelfiles: what `ollama create NAME -f Modelfile` reads."""

from __future__ import annotations

import os
from pathlib import Path

_FIRST_LINE = "# Written by lora export."

# Each kind of export has its own, so that neither replaces the other's.
OF_ADAPTER = "Modelfile"


def name_of_merged(gguf: Path) -> str:
    """The name of the Modelfile of a merged GGUF."""
    return f"{gguf.stem}.Modelfile"


def modelfile_of_merged(gguf: Path) -> str:
    """The Modelfile of a merged GGUF that lies beside it."""
    return f"{_FIRST_LINE}\n{_from(gguf)}\n"


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
        f"FROM {source}\n{_adapter(adapter)}\n"
    )


def may_replace(path: Path, gguf: Path) -> bool:
    """Whether there is no Modelfile, or one that was written here for the same GGUF."""
    if not os.path.lexists(path):
        return True
    if not path.is_file():
        return False
    first, *others = path.read_bytes().split(b"\n")
    return first.startswith(_FIRST_LINE.encode()) and any(
        line.encode() in others for line in (_from(gguf), _adapter(gguf))
    )


def _from(gguf: Path) -> str:
    return f"FROM {_quoted(f'./{gguf.name}')}"


def _adapter(gguf: Path) -> str:
    return f"ADAPTER {_quoted(f'./{gguf.name}')}"


def _quoted(path: str) -> str:
    return f'"{path}"' if any(character.isspace() for character in path) else path
