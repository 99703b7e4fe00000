"""Text to token ids and back: the tokenizer inside a GGUF, or a Hugging Face tokenizer.json.

A GGUF names its pre-tokenizer (`tokenizer.ggml.pre`) and llama.cpp holds the regular expressions
of each name (src/llama-vocab.cpp). Those here are the ones of the models' own tokenizer.json,
which llama.cpp rewrites for its smaller regex engine: a model is trained with these.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from gguf import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from forward.gguf_file import GGUFFile
from shaders.errors import InputError


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


@dataclass(frozen=True)
class _PreTokenizer:
    """How text is cut before byte-pair merging, and what else its name implies.

    Attributes:
        patterns: applied one after the other; each match, and each gap between, is a piece.
        compose: text is brought to Unicode NFC first.
        ignore_merges: a piece that is itself a token is taken whole.
        add_bos: whether BOS is added where the metadata has no add_bos_token.
    """

    patterns: tuple[str, ...]
    compose: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_LLAMA3_PRE = _PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)

_PRE_TOKENIZERS = {
    # llama.cpp's own fallback for files without a known name; no model was trained with it.
    "default": _PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _PreTokenizer((_GPT2,)),
    "llama-bpe": _LLAMA3_PRE,
    "llama-v3": _LLAMA3_PRE,
    "llama3": _LLAMA3_PRE,
    "qwen2": _PreTokenizer((_QWEN2,), compose=True),
    "smollm": _PreTokenizer((r"\p{N}", _GPT2)),
}

# Tokens that end a turn or a text, by name, as llama.cpp finds them (llama-vocab.cpp, "EOG"):
# the metadata has one eos_token_id only, and models stop at others too.
_END_OF_TURN_TEXTS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
)


class Tokenizer:
    """Turns text into token ids and back.

    Attributes:
        add_bos: whether `encode` puts BOS first unless told otherwise.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        bos_id: int | None,
        eos_id: int | None,
        add_bos: bool,
        chat_template: str | None,
    ) -> None:
        """Wraps a Hugging Face tokenizer; use `from_gguf` or `from_file`."""
        self._tokenizer = tokenizer
        # Post-processors trim spaces off the offsets and add tokens; BOS is added here, alone.
        self._tokenizer.post_processor = None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._bos_id = bos_id
        self._eos_id = eos_id
        self._chat_template = chat_template
        self.add_bos = add_bos and bos_id is not None
        named = (tokenizer.token_to_id(text) for text in _END_OF_TURN_TEXTS)
        found = {token_id for token_id in (eos_id, *named) if token_id is not None}
        self._end_of_turn_ids = frozenset(found)

    @classmethod
    def from_gguf(cls, gguf_file: GGUFFile) -> Tokenizer:
        """Builds the tokenizer that the GGUF holds.

        Raises:
            InputError: the file holds none, or one of a kind that is not supported.
        """
        path, metadata = gguf_file.path, gguf_file.metadata
        pre_tokenizer = _pre_tokenizer(path, metadata)
        tokens = _vocabulary(path, metadata)
        tokenizer = _byte_level_bpe(path, metadata, tokens, pre_tokenizer)
        return cls(
            tokenizer,
            bos_id=_special_id(path, metadata, "bos", len(tokens)),
            eos_id=_special_id(path, metadata, "eos", len(tokens)),
            add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", pre_tokenizer.add_bos)),
            chat_template=metadata.get("tokenizer.chat_template"),
        )

    @classmethod
    def from_file(cls, path: str | Path, *, gguf_file: GGUFFile | None = None) -> Tokenizer:
        """Reads a tokenizer.json, or a directory that holds one, as Hugging Face writes them.

        `tokenizer_config.json` (BOS, EOS, chat template) and `chat_template.jinja` are read from
        beside it where they are. BOS is added if the tokenizer.json itself adds it.

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
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"{file} is not a tokenizer.json: {error}.") from error
        first_id = _prefixed_id(tokenizer)
        config = _read_config(file.parent / "tokenizer_config.json")
        bos_id = _configured_id(tokenizer, config, "bos_token")
        eos_id = _configured_id(tokenizer, config, "eos_token")
        template = _configured_template(file.parent / "chat_template.jinja", config)
        if gguf_file is not None:
            n_tokens = tokenizer.get_vocab_size()
            model_bos, model_eos = (
                _special_id(gguf_file.path, gguf_file.metadata, name, n_tokens)
                for name in ("bos", "eos")
            )
            bos_id = model_bos if bos_id is None else bos_id
            eos_id = model_eos if eos_id is None else eos_id
            template = template or gguf_file.metadata.get("tokenizer.chat_template")
        return cls(
            tokenizer,
            bos_id=bos_id if first_id is None else first_id,
            eos_id=eos_id,
            add_bos=first_id is not None,
            chat_template=template,
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
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that turns messages into text; None where there is none."""
        return self._chat_template

    def encode(self, text: str, *, add_bos: bool | None = None) -> TokenizedText:
        """Cuts a text into tokens; special tokens written in it become their ids.

        Args:
            text: any text.
            add_bos: puts BOS first; by default where the model asks for it. Say False for a
                rendered chat template, which writes BOS itself.

        Raises:
            InputError: BOS is asked for and the model has none, or the text holds half a
                surrogate pair.
        """
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise InputError(f"The text {text[:40]!r} cannot be tokenized: {error}.") from error
        if not (self.add_bos if add_bos is None else add_bos):
            return TokenizedText(encoding.ids, encoding.offsets)
        if self._bos_id is None:
            raise InputError("The tokenizer has no BOS token to put first.")
        return TokenizedText([self._bos_id, *encoding.ids], [(0, 0), *encoding.offsets])

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Returns the text of the tokens; bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: token ids; those beyond the vocabulary have no text.
            skip_special: leaves out control tokens (BOS, <|im_end|>, …).
        """
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special))


def _pre_tokenizer(path: Path, metadata: dict[str, Any]) -> _PreTokenizer:
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        raise InputError(f"{path} holds no tokenizer; name one with model.tokenizer.")
    if model != "gpt2":
        raise InputError(
            f"{path} has a tokenizer of the kind {model!r}, which is not supported yet; supported "
            "is gpt2 (byte-level BPE). Name the model's tokenizer.json with model.tokenizer."
        )
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise InputError(
            f"{path} has the pre-tokenizer {name!r}, which is not supported yet; supported: "
            f"{', '.join(_PRE_TOKENIZERS)}. Name the model's tokenizer.json with model.tokenizer."
        )
    return _PRE_TOKENIZERS[name]


def _vocabulary(path: Path, metadata: dict[str, Any]) -> dict[str, int]:
    """Token to id; the key of an empty token is [EMPTY_id], as in llama.cpp."""
    texts = _strings(path, metadata, "tokenizer.ggml.tokens")
    vocabulary: dict[str, int] = {}
    for token, text in enumerate(texts):
        if text in vocabulary:
            raise InputError(f"{path} is damaged: its tokenizer has the token {text!r} twice.")
        vocabulary[text or f"[EMPTY_{token}]"] = token
    return vocabulary


def _byte_level_bpe(
    path: Path, metadata: dict[str, Any], tokens: dict[str, int], pre_tokenizer: _PreTokenizer
) -> tokenizers.Tokenizer:
    merges = []
    for merge in _strings(path, metadata, "tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if not left or not right:
            raise InputError(f"{path} is damaged: its tokenizer has the merge {merge!r}.")
        merges.append((left, right))
    try:
        model = models.BPE(tokens, merges, ignore_merges=pre_tokenizer.ignore_merges)
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(
            f"{path} is damaged: its tokenizer's merges are wrong ({error})."
        ) from None
    tokenizer = tokenizers.Tokenizer(model)
    if pre_tokenizer.compose:
        tokenizer.normalizer = normalizers.NFC()
    splits = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        for pattern in pre_tokenizer.patterns
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(_added_tokens(path, metadata, tokens))
    return tokenizer


def _added_tokens(path: Path, metadata: dict[str, Any], tokens: dict[str, int]) -> list[AddedToken]:
    """The tokens that are found in the text as they are written, before it is cut."""
    kinds = metadata.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise InputError(
            f"{path} is damaged: its tokenizer has {len(tokens)} tokens, but types for "
            f"{len(kinds)}."
        )
    added = []
    for text, kind in zip(tokens, kinds, strict=True):
        # Some converters leave <|im_end|> and its like as normal tokens; llama.cpp mends that too.
        special = kind in (TokenType.CONTROL, TokenType.UNKNOWN) or text in _END_OF_TURN_TEXTS
        if special or kind == TokenType.USER_DEFINED:
            added.append(AddedToken(text, special=special, normalized=False))
    return added


def _strings(path: Path, metadata: dict[str, Any], key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise InputError(f"{path} is damaged: {key} is no list of strings.")
    return values


def _special_id(path: Path, metadata: dict[str, Any], name: str, n_tokens: int) -> int | None:
    token = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if token is not None and not (isinstance(token, int) and 0 <= token < n_tokens):
        raise InputError(
            f"{path} is damaged: tokenizer.ggml.{name}_token_id is {token!r}; it must be below "
            f"{n_tokens}."
        )
    return token


def _prefixed_id(tokenizer: tokenizers.Tokenizer) -> int | None:
    """The token that the tokenizer.json puts before a text, found by what it does to one."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    prefixed = tokenizer.encode("a", add_special_tokens=True).ids
    return None if plain[:1] == prefixed[:1] else int(prefixed[0])


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise InputError(f"{file} holds no JSON object.")
    return config


def _configured_id(tokenizer: tokenizers.Tokenizer, config: dict[str, Any], key: str) -> int | None:
    value = config.get(key)
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        return None
    token = tokenizer.token_to_id(text)
    if token is None:
        raise InputError(f"tokenizer_config.json names the {key} {text!r}, no token of it.")
    return int(token)


def _configured_template(file: Path, config: dict[str, Any]) -> str | None:
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates; transformers takes "default"
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None
