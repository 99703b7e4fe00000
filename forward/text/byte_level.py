"""Byte-level BPE tokenizers out of a GGUF, merged by Hugging Face's tokenizers library."""

from __future__ import annotations

import re
from collections.abc import Sequence

import tokenizers
from gguf import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from lora.forward.gguf.file import GGUFFile
from lora.forward.text.pre_tokenizers import PreTokenizer
from lora.forward.text.vocabulary import Vocabulary, merges
from lora.shaders.errors import InputError
from lora.shaders.untrusted import is_panic, reason_of, shown

_BETWEEN_WORDS = re.compile("[A-Za-z] [A-Za-z]")
_MOST_SPACES = 8  # looked at before a cut is given up


class LibraryCodec:
    """A tokenizer of the tokenizers library.

    Attributes:
        vocab_size: number of tokens; the library's ids from here on are left out.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocab_size: int | None = None) -> None:
        """Wraps a tokenizer and takes its post-processor, truncation and padding off."""
        # Post-processors trim spaces off the offsets and add tokens; BOS is added elsewhere.
        tokenizer.post_processor = None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._n_library: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.vocab_size = self._n_library if vocab_size is None else vocab_size
        # SentencePiece's, out of a tokenizer.json: it puts a space before a text.
        first = self._tokenizer.encode("a", add_special_tokens=False).tokens[:1]
        self._prefixes = "".join(first).startswith(("▁", "Ġ"))

    def encode(
        self, text: str, *, continues: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The text's ids and, in characters of it, where each begins and ends.

        `continues` says that the text goes on from another: no space is put before it.
        """
        if continues and self._prefixes:
            # The space goes before a line break, with which nothing merges.
            ids, offsets = self.encode("\n" + text)
            first = next((t for t, (_, end) in enumerate(offsets) if end > 1), len(ids))
            if first == len(ids) or offsets[first][0] >= 1:
                return ids[first:], [(start - 1, end - 1) for start, end in offsets[first:]]
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except BaseException as error:
            if not is_panic(error):
                raise
            raise InputError(
                f"The text {shown(text)} can't be tokenized: a library gave up on it "
                f"({reason_of(error)})."
            ) from None
        ids, offsets = encoding.ids, encoding.offsets
        if self.vocab_size < self._n_library and max(ids, default=0) >= self.vocab_size:
            kept = [place for place, token in enumerate(ids) if token < self.vocab_size]
            return [ids[place] for place in kept], [offsets[place] for place in kept]
        return ids, offsets

    def cut_before(self, text: str, border: int) -> int:
        """A place before a border at which the text can be cut without other tokens; else 0."""
        return 0

    def ids_of(self, texts: Sequence[str]) -> dict[str, int]:
        """The ids of those texts that are tokens."""
        found = {}
        for text in texts:
            if text.isascii() or text.encode(errors="replace").decode() == text:
                found[text] = self._tokenizer.token_to_id(text)
        return {text: int(token) for text, token in found.items() if token is not None}

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """The text of the ids; those that are no tokens have none."""
        known = [token for token in ids if token < self.vocab_size]
        return str(self._tokenizer.decode(known, skip_special_tokens=skip_special))


class ByteLevelCodec(LibraryCodec):
    """A byte-level tokenizer that cuts text by an expression of forward/text/pre_tokenizers.py."""

    def cut_before(self, text: str, border: int) -> int:
        """A place before a border at which the text can be cut without other tokens; else 0.

        It is a space between two ASCII letters. None of the expressions matches a letter and a
        space behind it, none looks back, and what looks ahead (white space, at what ends it) is
        past the letter. So each side has the words that it has in the whole, wherever the text
        ends behind the border; NFC composes neither letter with the space.
        """
        end = max(border - 1, 0)  # the letter behind the space stands before the border
        for _ in range(_MOST_SPACES):
            end = text.rfind(" ", 1, end)
            if end < 0:
                return 0
            if _BETWEEN_WORDS.match(text, end - 1):
                return end
        return 0


def byte_level(
    gguf_file: GGUFFile, vocabulary: Vocabulary, pre_tokenizer: PreTokenizer
) -> ByteLevelCodec:
    """The tokenizer of a GGUF whose kind is gpt2.

    Args:
        gguf_file: the model.
        vocabulary: its tokens.
        pre_tokenizer: how text is cut.

    Raises:
        InputError: the merges are damaged.
    """
    pairs = merges(gguf_file)
    # SmolLM2 has no tokens for some bytes. llama.cpp leaves these out after merging, the library
    # before, so that their neighbours would merge: here they get ids, which are left out after.
    n_tokens = len(vocabulary.texts)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    absent = [character for character in alphabet if character not in vocabulary.ids]
    ids = vocabulary.ids | {text: n_tokens + place for place, text in enumerate(absent)}
    try:
        model = models.BPE(ids, pairs, ignore_merges=pre_tokenizer.ignore_merges)
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(
            f"{gguf_file.path} is damaged: its tokenizer's merges are wrong "
            f"({str(error)[:200].rstrip('.')})."
        ) from None
    tokenizer = tokenizers.Tokenizer(model)
    if pre_tokenizer.compose:
        tokenizer.normalizer = normalizers.NFC()
    splits = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        for pattern in pre_tokenizer.patterns
    ]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    added = []
    for text, kind in zip(vocabulary.texts, vocabulary.kinds, strict=True):
        special = kind in (TokenType.CONTROL, TokenType.UNKNOWN)
        if special or kind == TokenType.USER_DEFINED:
            added.append(AddedToken(text, special=special, normalized=False))
    tokenizer.add_tokens(added)
    return ByteLevelCodec(tokenizer, n_tokens)
