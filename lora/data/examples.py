"""Rows to tokens: which text the model sees, and which of its tokens it is trained to predict.

A token is trained where it shares a character with a trained stretch of the text; stretches are
found in the text, never by tokenizing parts, so the tokens are those that the model will see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from lora.data.records import load_records
from lora.forward.text.tokenizer import TokenizedText
from lora.shaders.errors import InputError

if TYPE_CHECKING:
    from lora.config.schema import DataConfig

Span = tuple[int, int]  # (start, end) in characters, end exclusive


class TextTokenizer(Protocol):
    """What is asked of a tokenizer here; `lora.forward.text.tokenizer.Tokenizer` is one."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def end_of_turn_ids(self) -> frozenset[int]: ...
    @property
    def chat_template(self) -> str | None: ...
    def encode(self, text: str, *, add_bos: bool | None = None) -> TokenizedText: ...
    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...


@dataclass(frozen=True)
class Example:
    """One row as tokens.

    Attributes:
        ids: int32 [n], the tokens, n at most data.max_length.
        trained: bool [n]; trained[t] says that token t is predicted from those before it and
            counts in the loss. trained[0] is False: nothing stands before it.
        index: its place in the list that `load_examples` returned.
        cut: data.max_length cut off some of what would be trained, an answer's end at least.
    """

    ids: np.ndarray
    trained: np.ndarray
    index: int
    cut: bool = False


@dataclass(frozen=True)
class DataSummary:
    """What was loaded, for printing."""

    data_format: str  # chat, completion, instruct or text
    n_examples: int  # records that are used
    n_tokens: int  # of all used records, after cutting
    n_trained_tokens: int  # of these, tokens that count in the loss
    n_cut: int  # records longer than max_length, cut at the end
    n_untrained: int  # records left out because no token of theirs is trained
    longest: int  # tokens of the longest row before cutting
    max_length: int  # tokens that a row may have

    def __str__(self) -> str:
        text = (
            f"{self.n_examples} {self.data_format} examples, {self.n_tokens} tokens, "
            f"{self.n_trained_tokens} of them trained; the longest row has {self.longest}"
        )
        if self.n_cut:
            text += f"; {self.n_cut} cut to {self.max_length}"
        if self.n_untrained:
            text += f"; {self.n_untrained} left out, none of their tokens is trained"
        return text


@dataclass(frozen=True)
class _MarkedText:
    """A row's text before tokenizing.

    Attributes:
        text: all of it.
        spans: the stretches to train on, ascending.
        rendered: it comes out of a chat template, which writes BOS and ends of turns itself.
        turns: the spans are assistant turns, each to be trained through its end-of-turn token.
        may_end: EOS may follow: the text ends with something that the model is to say.
    """

    text: str
    spans: list[Span]
    rendered: bool
    turns: bool
    may_end: bool


def load_examples(
    settings: DataConfig, tokenizer: TextTokenizer, split: Literal["train", "eval"] = "train"
) -> tuple[list[Example], DataSummary]:
    """Loads and tokenizes the records of data.train or data.eval.

    Args:
        settings: the config's `data:`.
        tokenizer: the model's.
        split: which of the two; data.eval must be set for "eval".

    Raises:
        InputError: data can't be read, a row doesn't fit its format, the model has no chat
            template for chats, or no token of the whole data set is trained.
    """
    source = settings.train if split == "train" else settings.eval
    if source is None:
        raise InputError("data.eval: got null; name the examples to evaluate on.")
    data_format, records = load_records(source, settings.format, split)
    examples: list[Example] = []
    n_cut = longest = 0
    for record in records:
        try:
            ids, trained = tokenize_record(record.columns, data_format, settings, tokenizer)
        except InputError as error:
            raise InputError(f"{record.place}: {error}") from error
        longest = max(longest, len(ids))
        n_cut += len(ids) > settings.max_length
        # A row that loses only what isn't trained, as ChatML's last line break, is whole.
        cut = bool(trained[settings.max_length :].any())
        ids, trained = ids[: settings.max_length], trained[: settings.max_length]
        if trained.any():
            examples.append(Example(ids, trained, len(examples), cut))
    if not examples:
        raise InputError(
            f"data.{split}: no token of its {len(records)} rows is trained: they are empty, have "
            f"no assistant turn, or their answers begin beyond data.max_length "
            f"({settings.max_length} tokens; the longest row has {longest})."
        )
    summary = DataSummary(
        data_format=data_format,
        n_examples=len(examples),
        n_tokens=sum(len(example.ids) for example in examples),
        n_trained_tokens=sum(int(example.trained.sum()) for example in examples),
        n_cut=n_cut,
        n_untrained=len(records) - len(examples),
        longest=longest,
        max_length=settings.max_length,
    )
    return examples, summary


def tokenize_record(
    columns: dict[str, Any], data_format: str, settings: DataConfig, tokenizer: TextTokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Turns one record into tokens, before cutting.

    Returns:
        ids int32 [n] and trained bool [n].

    Raises:
        InputError: the row can't be rendered or its trained part can't be found.
    """
    marked = _mark(columns, data_format, settings.train_on, tokenizer)
    # A rendered template holds BOS where the model wants it; a second one would be added here.
    tokens = tokenizer.encode(marked.text, add_bos=False if marked.rendered else None)
    ids, offsets = list(tokens.ids), tokens.offsets
    trained = [False] * len(ids)
    for start, end in marked.spans:
        inside = [t for t, (a, b) in enumerate(offsets) if a < b and a < end and b > start]
        for t in inside[: _turn_length(marked, [ids[t] for t in inside], tokenizer)]:
            trained[t] = True
    if _wants_eos(marked, data_format, ids, settings, tokenizer):
        if tokenizer.eos_id is None:
            raise InputError("The tokenizer has no EOS token to append; set data.append_eos: off.")
        if ids[-1:] != [tokenizer.eos_id]:
            ids.append(tokenizer.eos_id)
            trained.append(True)
    if trained:
        trained[0] = False
    return np.array(ids, dtype=np.int32), np.array(trained, dtype=np.bool_)


def _mark(
    columns: dict[str, Any], data_format: str, train_on: str, tokenizer: TextTokenizer
) -> _MarkedText:
    if data_format == "chat":
        return _mark_chat(columns["messages"], train_on, tokenizer)
    if data_format == "instruct" and tokenizer.chat_template is not None:
        question = "\n\n".join(_instruction_parts(columns))
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": columns["output"]},
        ]
        return _mark_chat(messages, train_on, tokenizer)
    if data_format == "instruct":
        prompt = "".join(part + "\n\n" for part in _instruction_parts(columns))
        text = prompt + columns["output"]
    elif data_format == "completion":
        prompt = columns["prompt"]
        text = prompt + columns["completion"]
    else:
        prompt, text = "", columns["text"]
    start = 0 if train_on == "all" else len(prompt)
    return _MarkedText(text, [(start, len(text))], rendered=False, turns=False, may_end=True)


def _instruction_parts(columns: dict[str, Any]) -> list[str]:
    """The instruction, and the input where it isn't empty (Alpaca writes "" for none)."""
    return [part for part in (columns["instruction"], columns.get("input")) if part]


def _mark_chat(
    messages: list[dict[str, Any]], train_on: str, tokenizer: TextTokenizer
) -> _MarkedText:
    template = tokenizer.chat_template
    if template is None:
        raise InputError(
            "The model has no chat template. Use a model that has one, name its tokenizer with "
            "model.tokenizer, or write the data as prompt and completion."
        )
    names = {
        f"{name}_token": None if token is None else tokenizer.decode([token], skip_special=False)
        for name, token in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id))
    }

    from lora.forward.text.chat_template import render_chat  # with Jinja2, for chats only

    def render(n_messages: int, add_generation_prompt: bool = False) -> str:
        return render_chat(
            template,
            messages[:n_messages],
            add_generation_prompt=add_generation_prompt,
            bos_token=names["bos_token"],
            eos_token=names["eos_token"],
        )

    text = render(len(messages))
    may_end = messages[-1]["role"] == "assistant"
    if train_on == "all":
        return _MarkedText(text, [(0, len(text))], rendered=True, turns=False, may_end=may_end)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise InputError(
                "The chat begins with the assistant, so nothing stands before what it says; begin "
                "with a user's message, or set data.train_on: all."
            )
        before, through = render(index, add_generation_prompt=True), render(index + 1)
        if not through.startswith(before) or not text.startswith(through):
            raise InputError(
                f"The chat template rewrites earlier text when the assistant's message {index} is "
                "added, so what it said cannot be told apart; set data.train_on: all."
            )
        spans.append((len(before), len(through)))
    return _MarkedText(text, spans, rendered=True, turns=True, may_end=may_end)


def _turn_length(marked: _MarkedText, ids: list[int], tokenizer: TextTokenizer) -> int:
    """How many of a span's tokens are the turn: through its end-of-turn token.

    ChatML has a line break after <|im_end|>: generation stops before it, so it isn't trained.
    """
    if not marked.turns:
        return len(ids)
    end = _end_of_turn(ids, tokenizer)
    return len(ids) if end is None else end + 1


def _end_of_turn(ids: list[int], tokenizer: TextTokenizer) -> int | None:
    """Where the end-of-turn token stands that only white space follows; None without one."""
    for position in range(len(ids) - 1, -1, -1):
        if ids[position] in tokenizer.end_of_turn_ids:
            return position
        if tokenizer.decode([ids[position]], skip_special=False).strip():
            return None
    return None


def _wants_eos(
    marked: _MarkedText,
    data_format: str,
    ids: list[int],
    settings: DataConfig,
    tokenizer: TextTokenizer,
) -> bool:
    if settings.append_eos != "auto":
        return settings.append_eos == "on"
    if data_format == "text" or not marked.may_end:
        return False
    return not marked.rendered or _end_of_turn(ids, tokenizer) is None
