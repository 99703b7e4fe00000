"""The tokens of a GGUF: their texts, kinds and scores, and which of them end a text."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from lora.forward.gguf.file import GGUFFile
from lora.shaders.errors import InputError
from lora.shaders.untrusted import shown

# Tokens that end a turn or a text, by name, as llama.cpp finds them (llama-vocab.cpp, "EOG"):
# most metadata names one eos_token_id only, and models stop at others too.
END_TEXTS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "</s>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "[e~[",
    "<｜end▁of▁sentence｜>",
)
# Control tokens of gpt-oss that are part of what it says.
_SHOWN_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a GGUF.

    Attributes:
        path: of the file, for error messages.
        texts: one a token; that of an empty token is [EMPTY_id], as in llama.cpp.
        ids: text to id.
        kinds: one `gguf.TokenType` a token; <|im_end|> and its like are CONTROL, which some
            converters forget.
        bos_id: the token that begins a text.
        eos_id: the token that ends one.
        end_ids: every token at which generation stops.
    """

    path: Path
    texts: list[str]
    ids: dict[str, int]
    kinds: list[int]
    bos_id: int | None
    eos_id: int | None
    end_ids: frozenset[int]

    @classmethod
    def from_gguf(cls, gguf_file: GGUFFile, **defaults: int) -> Vocabulary:
        """Reads the vocabulary.

        Args:
            gguf_file: the model.
            defaults: bos and eos of the tokenizer's kind, for files that don't say.

        Raises:
            InputError: it is damaged.
        """
        path, metadata = gguf_file.path, gguf_file.metadata
        ids: dict[str, int] = {}
        for token, text in enumerate(_strings(gguf_file, "tokenizer.ggml.tokens")):
            text = text or f"[EMPTY_{token}]"
            if text in ids:
                raise InputError(
                    f"{path} is damaged: its tokenizer has the token {shown(text)} twice."
                )
            ids[text] = token
        kinds = _kinds(path, metadata.get("tokenizer.ggml.token_type"), len(ids))
        if len(kinds) != len(ids):
            raise InputError(
                f"{path} is damaged: its tokenizer has {len(ids)} tokens, but types for "
                f"{len(kinds)}."
            )
        ends = end_texts(ids)
        for text in END_TEXTS:
            if text in ids:
                kinds[ids[text]] = TokenType.CONTROL
        if "<|end|>" in ids and "<|end|>" not in ends:
            kinds[ids["<|end|>"]] = TokenType.USER_DEFINED
        if "</s>" in ids and "</s>" not in ends:
            kinds[ids["</s>"]] = TokenType.NORMAL
        for text in _SHOWN_TEXTS:
            if text in ids:
                kinds[ids[text]] = TokenType.USER_DEFINED
        bos_id, eos_id = (
            special_id(gguf_file, name, len(ids), defaults.get(name)) for name in ("bos", "eos")
        )
        end_ids = {ids[text] for text in ends} | metadata_end_ids(gguf_file, len(ids))
        if eos_id is not None:
            end_ids.add(eos_id)
        return cls(path, list(ids), ids, kinds, bos_id, eos_id, frozenset(end_ids))


def end_texts(tokens: Collection[str]) -> list[str]:
    """Which of the tokens end a text, by name.

    Two names mean something else in some vocabularies, which llama.cpp tells by their neighbours:
    <|end|> ends a message, not the turn, where <|return|> or <|flush|> does that (gpt-oss, Solar),
    and </s> is an HTML tag beside <|tool_response> (Gemma 4).
    """
    found = [text for text in END_TEXTS if text in tokens]
    calls = "<|call|>" in found or "<|calls|>" in found
    if calls and ("<|return|>" in found or "<|flush|>" in found) and "<|end|>" in found:
        found.remove("<|end|>")
    if "<|tool_response>" in found and "</s>" in found:
        found.remove("</s>")
    return found


def metadata_end_ids(gguf_file: GGUFFile, n_tokens: int) -> set[int]:
    """The tokens that the metadata says end a turn, a message or a text.

    Args:
        gguf_file: the model.
        n_tokens: ids must be below it.

    Raises:
        InputError: one is not.
    """
    named = {special_id(gguf_file, name, n_tokens) for name in ("eos", "eot", "eom")}
    several = gguf_file.metadata.get("tokenizer.ggml.eos_token_ids")  # Ollama's converter
    for token in several if isinstance(several, list) else []:
        named.add(_checked(gguf_file.path, "tokenizer.ggml.eos_token_ids", token, n_tokens))
    return {token for token in named if token is not None}


def special_id(
    gguf_file: GGUFFile, name: str, n_tokens: int, default: int | None = None
) -> int | None:
    """The id in tokenizer.ggml.NAME_token_id; the default where there is no such key.

    Raises:
        InputError: the id is not below n_tokens.
    """
    key = f"tokenizer.ggml.{name}_token_id"
    token = gguf_file.metadata.get(key)
    if token is None:
        return default if default is not None and default < n_tokens else None
    return _checked(gguf_file.path, key, token, n_tokens)


def merges(gguf_file: GGUFFile) -> list[tuple[str, str]]:
    """The pairs that merge, in the order of `tokenizer.ggml.merges`.

    Raises:
        InputError: there are none, or one is no pair.
    """
    pairs = []
    for merge in _strings(gguf_file, "tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if not left or not right:
            raise InputError(
                f"{gguf_file.path} is damaged: its tokenizer has the merge {shown(merge)}."
            )
        pairs.append((left, right))
    return pairs


def _strings(gguf_file: GGUFFile, key: str) -> list[str]:
    values = gguf_file.metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise InputError(f"{gguf_file.path} is damaged: {key} is no list of strings.")
    return values


def _kinds(path: Path, values: Any, n_tokens: int) -> list[int]:
    """One type a token; all are normal where the file says nothing."""
    if values is None or values == []:
        return [TokenType.NORMAL] * n_tokens
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise InputError(
            f"{path} is damaged: tokenizer.ggml.token_type is {shown(values)}; it must be a list "
            "of whole numbers."
        )
    return list(values)


def _checked(path: Path, key: str, token: Any, n_tokens: int) -> int:
    if type(token) is not int or not 0 <= token < n_tokens:
        raise InputError(
            f"{path} is damaged: {key} is {shown(token)}; it must be below {n_tokens}."
        )
    return token
