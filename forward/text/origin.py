"""Where a tokenizer was read from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from lora.forward.gguf.file import GGUFFile

_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class TokenizerOrigin:
    """Where a tokenizer was read from, so that another process can read it, too.

    Attributes:
        gguf: the model's file; None for a tokenizer.json alone.
        file: a tokenizer.json, or the directory with one; None for the GGUF's own.
    """

    gguf: Path | None
    file: Path | None

    def digest(self) -> str:
        """Of all that decides which tokens and which chat template it has."""
        digest = hashlib.sha256()
        if self.gguf is not None:
            metadata = GGUFFile(self.gguf).metadata
            names = sorted(n for n in metadata if n.startswith("tokenizer.") or n == "general.name")
            for name in names:
                digest.update(f"{name}={metadata[name]!r}\0".encode(errors="backslashreplace"))
        if self.file is not None:
            folder = self.file if self.file.is_dir() else self.file.parent
            files = [folder / name for name in _FILES]
            for path in files if self.file.is_dir() else [self.file, *files]:
                digest.update(path.read_bytes() if path.is_file() else b"-")
        return digest.hexdigest()
