"""Tokenizers trained on the spot, as the metadata of a GGUF that llama.cpp can load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from gguf import TokenType
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

from tests.support.tiny_gguf import write_tiny_llama
from tests.support.tokenizer_corpus import lines

_SPECIAL = ("<unk>", "<s>", "</s>")
# Two of these are longer forms of others, one is white space, one is a kind that nobody marks.
_ADDED = {
    "<|endoftext|>": TokenType.CONTROL,
    "<|user|>": TokenType.CONTROL,
    "<|user|>>": TokenType.CONTROL,
    "<tool>": TokenType.USER_DEFINED,
    "\n\n": TokenType.USER_DEFINED,
    "  ": TokenType.USER_DEFINED,
    "<unused0>": TokenType.UNUSED,
    "<|end|>": TokenType.NORMAL,
}
SPECIAL_TEXTS = (*_SPECIAL, *_ADDED, "<|use", ">", "<0x0A>")


@cache
def byte_level() -> dict[str, Any]:
    """A byte-level BPE whose tokens cross words, digits, spaces and signs.

    It was trained without cutting, so that what a pre-tokenizer cuts shows in the ids.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = _train(tokenizer, 6000, initial_alphabet=alphabet)
    tokens = ["<|im_start|>", "<|im_end|>", "<tool>", *vocabulary]
    kinds = [TokenType.CONTROL, TokenType.CONTROL, TokenType.USER_DEFINED]
    kinds += [TokenType.NORMAL] * len(vocabulary)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": None,
    }


@cache
def sentencepiece(*, words: bool, tied: bool = False) -> dict[str, Any]:
    """A SentencePiece vocabulary with scores, byte tokens and special tokens of every kind.

    Args:
        words: a space is only ever first in a token, as in Llama 2; else anywhere.
        tied: five tokens in a row have the same score.
    """
    vocabulary, merges = _train_spaced(words)
    scores = [-float(place // 5 if tied else place) for place in range(len(vocabulary))]
    made = {left + right for left, right in merges}
    # Merged tokens best first, then single characters, whose scores nobody asks for.
    ordered = [token for token in vocabulary if token in made]
    ordered += [token for token in vocabulary if token not in made]
    tokens, kinds = _with_special(ordered)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [0.0] * (len(tokens) - len(scores)) + scores,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.bos_token_id": None,
        "tokenizer.ggml.eos_token_id": None,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": None,
    }


@cache
def gemma4() -> dict[str, Any]:
    """The same with a list of merges instead of scores, as Gemma 4 has it."""
    vocabulary, merges = _train_spaced(words=False)
    runs = ["\n" * count for count in range(2, 6)]
    tokens, kinds = _with_special([*vocabulary, *(run for run in runs if run not in _ADDED)])
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.pre": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }


def write_model(path: Path, metadata: dict[str, Any], **changes: Any) -> Path:
    """A tiny llama with the tokenizer; changes are keys without tokenizer.ggml., or whole keys."""
    changed = {key if "." in key else f"tokenizer.ggml.{key}": changes[key] for key in changes}
    values = {**metadata, **changed}
    size = len(values["tokenizer.ggml.tokens"])
    write_tiny_llama(path, n_layers=1, vocab_size=size, metadata=values)
    return path


def merges_of(metadata: dict[str, Any]) -> list[tuple[str, str]]:
    """The pairs of tokens that give each token, the best token's first, as transformers wants."""
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    pairs = [
        (-scores[token], cut, token[:cut], token[cut:])
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]


def _train_spaced(words: bool) -> tuple[list[str], list[tuple[str, str]]]:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    before_space = pre_tokenizers.Split("▁", "merged_with_next")
    # llama.cpp's merges of Gemma 4 never hold a line break
    at_newline = pre_tokenizers.Split(Regex(r"\n+"), "removed")
    cuts = [at_newline, before_space] if words else [at_newline]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    return _train(tokenizer, 3000, limit_alphabet=400)


def _train(
    tokenizer: tokenizers.Tokenizer, size: int, **settings: Any
) -> tuple[list[str], list[tuple[str, str]]]:
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, max_token_length=24, **settings
    )
    texts = [text for text in lines(3000, 1, []) if len(text) < 300]
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return list(model["vocab"]), [(left, right) for left, right in model["merges"]]


def _with_special(tokens: Sequence[str]) -> tuple[list[str], list[int]]:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    rest = [token for token in tokens if token not in _ADDED]
    everything = [*_SPECIAL, *byte_tokens, *_ADDED, *rest]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    kinds += [TokenType.BYTE] * len(byte_tokens) + list(_ADDED.values())
    kinds += [TokenType.NORMAL] * len(rest)
    return everything, [int(kind) for kind in kinds]
