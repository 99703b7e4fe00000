"""A SentencePiece vocabulary small enough to follow by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import TokenType

from lora.forward.gguf.file import GGUFFile
from tests.support.tiny_gguf import write_gguf

_SPECIAL = {
    "<unk>": TokenType.UNKNOWN,
    "<s>": TokenType.CONTROL,
    "</s>": TokenType.CONTROL,
    "<|user|>": TokenType.CONTROL,
    "<|endoftext|>": TokenType.CONTROL,
    "<tool>": TokenType.USER_DEFINED,
    "\n\n": TokenType.USER_DEFINED,
}
# Scores: the highest merges first; characters don't come from merges.
_MERGED = {"hi": -1.0, "▁hi": -2.0, "ab": -3.0, "bc": -3.0, "▁d": -4.0, "c▁d": -5.0}
_CHARACTERS = "▁hiabcd"


def spaced_metadata() -> dict[str, Any]:
    """Special tokens, 256 bytes, "hi", "▁hi", "ab", "bc", "▁d", "c▁d" and the letters of them."""
    kinds = dict(_SPECIAL)
    kinds |= {f"<0x{byte:02X}>": TokenType.BYTE for byte in range(256)}
    scores = [0.0] * len(kinds) + [*_MERGED.values()] + [-100.0] * len(_CHARACTERS)
    kinds |= {text: TokenType.NORMAL for text in [*_MERGED, *_CHARACTERS]}
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(kinds),
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds.values()],
        "tokenizer.ggml.scores": scores,
    }


def spaced_gguf(directory: Path, **changes: Any) -> GGUFFile:
    """A GGUF of the vocabulary alone; changes are keys without tokenizer.ggml., None: left out."""
    named = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    name = named.pop("tokenizer.ggml.name", None)
    path = directory / "spaced.gguf"
    write_gguf(path, {**spaced_metadata(), "general.name": name, **named}, {}, {})
    return GGUFFile(path)
