"""Text to token ids and back: the tokenizer inside a GGUF, or a Hugging Face tokenizer.json.

`tokenizer.ggml.model` says of which kind the GGUF's is: gpt2 is byte-level BPE and merged by the
tokenizers library (forward/text/byte_level.py), llama is SentencePiece
(forward/text/sentencepiece.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gguf import TokenType

from lora.forward.gguf.file import GGUFFile
from lora.forward.text import sentencepiece
from lora.forward.text.byte_level import byte_level
from lora.forward.text.configured import (
    configured_id,
    configured_templates,
    configured_text,
    read_config,
)
from lora.forward.text.foreign import ForeignCodec
from lora.forward.text.origin import TokenizerOrigin
from lora.forward.text.pre_tokenizers import named_pre_tokenizer
from lora.forward.text.vocabulary import (
    END_TEXTS,
    Vocabulary,
    end_texts,
    merges,
    metadata_end_ids,
    special_id,
)
from lora.shaders.errors import InputError
from lora.shaders.untrusted import reading, shown

_ADD_BOS = "tokenizer.ggml.add_bos_token"
_MOST_ENDINGS, _LONGEST_ENDING = 4096, 64  # kept; in characters


@dataclass(frozen=True)
class TokenizedText:
    """A text as tokens.

    Attributes:
        ids: one id a token.
        offsets: (start, end) a token, in characters of the text, end exclusive. A character
            spread over several tokens (an emoji) is in the offsets of each; a BOS that was
            added has (0, 0).
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


class _Codec(Protocol):
    """What turns text into ids and back, without BOS."""

    @property
    def vocab_size(self) -> int: ...

    def encode(
        self, text: str, *, continues: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]: ...

    def cut_before(self, text: str, border: int) -> int: ...

    def decode(self, ids: Sequence[int], skip_special: bool) -> str: ...


class Tokenizer:
    """Turns text into token ids and back.

    Attributes:
        add_bos: whether `encode` puts BOS first unless told otherwise.
        origin: the files that it was read from; None where it was made otherwise.
    """

    def __init__(
        self,
        codec: _Codec,
        *,
        bos_id: int | None,
        eos_id: int | None,
        add_bos: bool,
        end_of_turn_ids: frozenset[int],
        chat_template: str | None,
        tool_use_template: str | None = None,
        origin: TokenizerOrigin | None = None,
    ) -> None:
        """Completes a codec; use `from_gguf` or `from_file`."""
        self._codec = codec
        self._bos_id = bos_id
        self._eos_id = eos_id
        self._end_of_turn_ids = end_of_turn_ids
        self._chat_template = chat_template
        self._tool_use_template = tool_use_template
        self.add_bos = add_bos and bos_id is not None
        self.origin = origin
        self._endings: dict[str, list[int]] = {}

    @classmethod
    def open(cls, gguf_file: GGUFFile, file: str | None = None) -> Tokenizer:
        """The tokenizer of a model: the one inside the GGUF, or a tokenizer.json in its place.

        Args:
            gguf_file: the model.
            file: as `from_file` takes it; None for the GGUF's own.

        Raises:
            InputError: there is none, or it can't be read.
        """
        if file is None:
            return cls.from_gguf(gguf_file)
        return cls.from_file(file, gguf_file=gguf_file)

    @classmethod
    def from_gguf(cls, gguf_file: GGUFFile) -> Tokenizer:
        """Builds the tokenizer that the GGUF holds.

        Raises:
            InputError: the file holds none, or one of a kind that is not supported.
        """
        with reading(gguf_file.path, "a model with a tokenizer"):
            return cls._read(gguf_file)

    @classmethod
    def _read(cls, gguf_file: GGUFFile) -> Tokenizer:
        kind = _kind(gguf_file)
        codec: _Codec
        if kind == "gpt2":
            pre_tokenizer = named_pre_tokenizer(gguf_file)
            vocabulary = Vocabulary.from_gguf(gguf_file)
            codec = byte_level(gguf_file, vocabulary, pre_tokenizer)
            add_bos = pre_tokenizer.add_bos
        elif kind == "gemma4":
            vocabulary = Vocabulary.from_gguf(gguf_file)
            unknown_id = special_id(gguf_file, "unknown", len(vocabulary.texts))
            pairs = merges(gguf_file)
            codec = sentencepiece.by_merges(vocabulary, pairs, unknown_id=unknown_id)
            add_bos = True
        else:
            vocabulary = Vocabulary.from_gguf(gguf_file, bos=1, eos=2)
            codec = _by_scores(gguf_file, vocabulary)
            add_bos = True
        if kind != "gemma4":  # converters wrote False for Gemma 4, which was trained with BOS
            add_bos = _switch(gguf_file, _ADD_BOS, add_bos)
        return cls(
            codec,
            bos_id=vocabulary.bos_id,
            eos_id=vocabulary.eos_id,
            add_bos=add_bos,
            end_of_turn_ids=vocabulary.end_ids,
            chat_template=_template_of(gguf_file),
            tool_use_template=_template_of(gguf_file, ".tool_use"),
            origin=TokenizerOrigin(Path(gguf_file.path), None),
        )

    @classmethod
    def from_file(cls, path: str | Path, *, gguf_file: GGUFFile | None = None) -> Tokenizer:
        """Reads a tokenizer.json, or a directory that holds one, as Hugging Face writes them.

        `tokenizer_config.json` (BOS, EOS, chat template) and `chat_template.jinja` are read from
        beside it where they are. BOS is added if the GGUF says so, as by llama.cpp, or else if the
        tokenizer.json itself adds it.

        Args:
            path: the file or the directory.
            gguf_file: the model: says what BOS, EOS and the chat template are where the
                directory doesn't.

        Raises:
            InputError: there is no such file, or it is no tokenizer.
        """
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise InputError(f"There is no tokenizer {file}.")
        config = read_config(file.parent / "tokenizer_config.json")
        template, for_tools = configured_templates(file.parent, config)
        codec = ForeignCodec(file)
        named = {key: configured_text(config, key) for key in ("bos_token", "eos_token")}
        facts = codec.facts([*END_TEXTS, *filter(None, named.values())])
        first_id = facts.first_id
        bos_id, eos_id = (configured_id(facts.ids, key, text) for key, text in named.items())
        end_ids = {facts.ids[text] for text in end_texts(facts.ids)}
        add_bos = first_id is not None
        if gguf_file is not None:
            if isinstance(gguf_file.metadata.get(_ADD_BOS), bool) and not _is_gemma4(gguf_file):
                add_bos = gguf_file.metadata[_ADD_BOS]
            n_tokens = facts.n_tokens
            for name in ("bos", "eos"):
                token = gguf_file.metadata.get(f"tokenizer.ggml.{name}_token_id")
                if isinstance(token, int) and token >= n_tokens:
                    raise InputError(
                        f"{file} has {n_tokens:,} tokens, but {name.upper()} of {gguf_file.path} "
                        f"is token {token:,}: the tokenizer is another model's."
                    )
            model_bos, model_eos = (
                special_id(gguf_file, name, n_tokens) for name in ("bos", "eos")
            )
            bos_id = model_bos if bos_id is None else bos_id
            eos_id = model_eos if eos_id is None else eos_id
            end_ids |= metadata_end_ids(gguf_file, n_tokens)
            if template is None:
                template = _template_of(gguf_file)
                for_tools = _template_of(gguf_file, ".tool_use")
        return cls(
            codec,
            bos_id=bos_id if first_id is None else first_id,
            eos_id=eos_id,
            add_bos=add_bos,
            end_of_turn_ids=frozenset(end_ids if eos_id is None else end_ids | {eos_id}),
            chat_template=template,
            tool_use_template=for_tools,
            origin=TokenizerOrigin(None if gguf_file is None else Path(gguf_file.path), Path(path)),
        )

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text; None where the model has none."""
        return self._bos_id

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text; None where the model has none."""
        return self._eos_id

    @property
    def end_of_turn_ids(self) -> frozenset[int]:
        """Every token at which generation stops: EOS, <|im_end|>, <|eot_id|> and their like."""
        return self._end_of_turn_ids

    @property
    def vocab_size(self) -> int:
        """Number of tokens; the model's vocabulary may have padding rows beyond it."""
        return self._codec.vocab_size

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that turns messages into text; None where there is none."""
        return self._chat_template

    @property
    def tool_use_template(self) -> str | None:
        """A second template for chats with tools; None where the first serves these, too."""
        return self._tool_use_template

    def encode(
        self, text: str, *, add_bos: bool | None = None, continues: bool = False
    ) -> TokenizedText:
        """Cuts a text into tokens; special tokens written in it become their ids.

        EOS is never added here; whether a text for training ends with it, data.append_eos says.

        Args:
            text: any text.
            add_bos: puts BOS first, unless the text begins with it: a rendered chat template may
                write it. By default where the model asks for it.
            continues: the text goes on from another one: nothing is put before it, neither BOS nor
                the space with which some SentencePiece tokenizers begin a text.

        Raises:
            InputError: BOS is asked for and the model has none, or the text holds half a
                surrogate pair.
        """
        try:
            ids, offsets = self._codec.encode(text, continues=continues)
        except (TypeError, UnicodeEncodeError) as error:
            half = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
            reason = str(error) if half is None else f"{half!r} in it is half a surrogate pair"
            raise InputError(f"The text {text[:40]!r} cannot be tokenized: {reason}.") from error
        if continues or not (self.add_bos if add_bos is None else add_bos):
            return TokenizedText(ids, offsets)
        if self._bos_id is None:
            raise InputError("The tokenizer has no BOS token to put first.")
        if ids[:1] == [self._bos_id]:
            return TokenizedText(ids, offsets)
        return TokenizedText([self._bos_id, *ids], [(0, 0), *offsets])

    def cut_before(self, text: str, border: int) -> int:
        """A place before a border at which a text can be cut without other tokens.

        The tokens of `text[:place]` and those of `text[place:border]` are then together those of
        `text[:border]`, and the first are also the first of `text`'s, if none of these reaches
        across the place.

        Args:
            text: any text.
            border: in characters of it.

        Returns:
            The place in characters; 0 where none is known.
        """
        return self._codec.cut_before(text, border)

    def ending_ids(self, text: str) -> list[int]:
        """Ids of what ends a text, without BOS; short ones come again and again, and are kept.

        Args:
            text: the end of another, cut off where tokens don't change by it.

        Raises:
            InputError: the text holds half a surrogate pair.
        """
        found = self._endings.get(text)
        if found is None:
            found = self.encode(text, add_bos=False).ids
            if len(text) <= _LONGEST_ENDING:
                if len(self._endings) == _MOST_ENDINGS:
                    self._endings.clear()
                self._endings[text] = found
        return list(found)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Returns the text of the tokens; bytes that are no UTF-8 become U+FFFD.

        Some SentencePiece tokenizers (Llama 2) put a space before a text. It is taken off the
        beginning here, so the text of ids that go on from others may lack one: decode them all.

        Args:
            ids: token ids; those beyond the vocabulary have no text.
            skip_special: leaves out control tokens (BOS, <|im_end|>, …).
        """
        return self._codec.decode(ids, skip_special)


def _kind(gguf_file: GGUFFile) -> str:
    """gpt2, llama or gemma4."""
    model = gguf_file.metadata.get("tokenizer.ggml.model")
    if model is None:
        raise InputError(f"{gguf_file.path} holds no tokenizer; name one with model.tokenizer.")
    if model not in ("gpt2", "llama", "gemma4"):
        raise InputError(
            f"{gguf_file.path} has a tokenizer of the kind {shown(model)}, which is not supported; "
            "supported are gpt2 (byte-level BPE), llama (SentencePiece) and gemma4. Name the "
            "model's tokenizer.json with model.tokenizer."
        )
    return "gemma4" if _is_gemma4(gguf_file) else str(model)


def _is_gemma4(gguf_file: GGUFFile) -> bool:
    # Ollama's converter gives Gemma 4 the kind llama.
    kinds = (gguf_file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    return "gemma4" in kinds


def _switch(gguf_file: GGUFFile, key: str, default: bool) -> bool:
    value = gguf_file.metadata.get(key, default)
    if not isinstance(value, bool):
        raise InputError(
            f"{gguf_file.path} is damaged: {key} is {shown(value)}; it must be true or false."
        )
    return value


def _template_of(gguf_file: GGUFFile, name: str = "") -> str | None:
    """A chat template of the metadata; None where there is none, or no text."""
    template = gguf_file.metadata.get(f"tokenizer.chat_template{name}")
    return template if isinstance(template, str) else None


def _by_scores(gguf_file: GGUFFile, vocabulary: Vocabulary) -> sentencepiece.SentencePiece:
    path, metadata = gguf_file.path, gguf_file.metadata
    scores = metadata.get("tokenizer.ggml.scores")
    if (
        not isinstance(scores, list)
        or len(scores) != len(vocabulary.texts)
        or not all(type(score) in (int, float) and score == score for score in scores)
    ):
        raise InputError(
            f"{path} is damaged: tokenizer.ggml.scores must hold {len(vocabulary.texts)} numbers, "
            "one a token."
        )
    return sentencepiece.by_scores(
        vocabulary,
        scores,
        unknown_id=special_id(gguf_file, "unknown", len(vocabulary.texts), 0),
        add_space_prefix=_switch(gguf_file, "tokenizer.ggml.add_space_prefix", True),
        right_stripped=_right_stripped(gguf_file, vocabulary),
    )


def _right_stripped(gguf_file: GGUFFile, vocabulary: Vocabulary) -> set[int]:
    """Special tokens that swallow white space behind them; no GGUF says so, llama.cpp knows."""
    name = gguf_file.metadata.get("general.name")
    name = name.lower() if isinstance(name, str) else ""
    if "phi-3" not in name and "phi3" not in name:
        return set()
    special = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    found = {token for token, kind in enumerate(vocabulary.kinds) if kind in special}
    return found - {vocabulary.ids.get(text) for text in ("<unk>", "<s>", "<|endoftext|>")}
