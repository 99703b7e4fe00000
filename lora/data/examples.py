"""Rows to examples: which text the model sees, and which of its tokens it is trained to predict.

Messages become text in lora/data/turns.py and text becomes tokens in lora/data/masks.py; here they
are cut to data.max_length, counted, and put together for a whole data set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lora.data.conversations import conversation_of, instruction_parts
from lora.data.masks import (
    MaskedTokens,
    TextTokenizer,
    mask_conversation,
    mask_text,
    train_ends,
)
from lora.data.records import Record, load_records
from lora.data.turns import render_turns, unread_argument
from lora.shaders.errors import InputError

if TYPE_CHECKING:
    from lora.config.schema import DataConfig
    from lora.forward.text.chat_template import ChatTemplate

# Why a row gives no example.
_UNTRAINED = "empty, or without a turn to train"
_TOO_LONG = "what is trained begins beyond data.max_length"
_NO_WEIGHT = "of weight 0"


@dataclass(frozen=True)
class Example:
    """One row as tokens, or one turn of a row.

    Attributes:
        ids: int32 [n], the tokens, n at most data.max_length.
        trained: bool [n]; trained[t] says that token t is predicted from those before it and
            counts in the loss. trained[0] is False: nothing stands before it.
        index: its place in the list that `load_examples` returned.
        cut: data.max_length cut off some of what would be trained, an answer's end at least.
        row: the record's place in the data set, counted from 0.
        turn: the message that is trained, where the example is of one turn, since the whole
            rendering shows it otherwise than it was said; None for a whole row.
        n_cut: tokens that data.max_length cut off its end.
    """

    ids: np.ndarray
    trained: np.ndarray
    index: int
    cut: bool = False
    row: int = 0
    turn: int | None = None
    n_cut: int = 0


@dataclass(frozen=True)
class DataSummary:
    """What was loaded, for printing."""

    data_format: str  # chat, completion, instruct or text
    n_examples: int  # of the rows that are used; a chat may give several
    n_tokens: int  # of all of them, after cutting
    n_trained_tokens: int  # of these, tokens that count in the loss
    n_cut: int  # examples longer than max_length, cut at the end
    n_untrained: int  # rows left out because no token of theirs is trained
    longest: int  # tokens of the longest example before cutting
    max_length: int  # tokens that an example may have
    n_rows: int  # of the data set
    left_out: Mapping[str, int] = field(default_factory=dict)  # why, and how many of n_untrained
    ignored: tuple[str, ...] = ()  # columns that carry no meaning here
    dated: bool = False  # the chat template may write the time

    def __str__(self) -> str:
        n_used = self.n_rows - self.n_untrained
        text = f"{self.n_examples} {self.data_format} examples"
        text += f" of {n_used} rows" if n_used != self.n_examples else ""
        text += (
            f", {self.n_tokens} tokens, {self.n_trained_tokens} of them trained; the longest "
            f"{'row' if n_used == self.n_examples else 'example'} has {self.longest}"
        )
        if self.n_cut:
            text += f"; {self.n_cut} cut to {self.max_length}"
        for reason, number in self.left_out.items():
            text += f"; {number} left out, {reason}"
        if self.ignored:
            text += f"; ignored columns: {', '.join(map(printable, self.ignored))}"
        return text


@dataclass(frozen=True)
class LeftOut:
    """A row that gives no example.

    Attributes:
        row: its place in the data set, counted from 0.
        reason: as part of a sentence.
    """

    row: int
    reason: str


@dataclass(frozen=True)
class LoadedData:
    """A whole data set as examples.

    Attributes:
        places: where each row is: `data/train.jsonl, line 3`.
        lengths: tokens of each example before cutting, those of rows that are left out, too.
    """

    examples: list[Example]
    places: list[str]
    lengths: list[int]
    left_out: list[LeftOut]
    summary: DataSummary


def load_examples(
    settings: DataConfig,
    tokenizer: TextTokenizer,
    split: Literal["train", "eval"] = "train",
    now: datetime | None = None,
) -> tuple[list[Example], DataSummary]:
    """Loads and tokenizes the records of data.train or data.eval.

    Args:
        settings: the config's `data:`.
        tokenizer: the model's.
        split: which of the two; data.eval must be set for "eval".
        now: what chat templates take for the time; None for the clock.

    Raises:
        InputError: data can't be read, a row doesn't fit its format, the model has no chat
            template for chats, or no token of the whole data set is trained.
    """
    loaded = load_data(settings, tokenizer, split, now)
    if not loaded.examples:
        summary = loaded.summary
        reasons = "; ".join(f"{n_rows}, {reason}" for reason, n_rows in summary.left_out.items())
        raise InputError(
            f"data.{split}: no token of its {summary.n_rows} rows is trained. Left out: {reasons} "
            f"(data.max_length is {settings.max_length}; the longest row has {summary.longest} "
            "tokens)."
        )
    return loaded.examples, loaded.summary


def load_data(
    settings: DataConfig,
    tokenizer: TextTokenizer,
    split: Literal["train", "eval"] = "train",
    now: datetime | None = None,
) -> LoadedData:
    """The same with what is left out, which may be all; arguments and errors as `load_examples`."""
    source = settings.train if split == "train" else settings.eval
    if source is None:
        raise InputError("data.eval: got null; name the examples to evaluate on.")
    data_format, records = load_records(source, settings.format, split)
    if split == "train" and data_format in ("completion", "text"):
        _check_settings_of_chats(settings, data_format)
    rows = RowTokenizer(settings, tokenizer, data_format, now)
    examples: list[Example] = []
    lengths: list[int] = []
    left_out: list[LeftOut] = []
    for row, record in enumerate(records):
        try:
            masked, reason = _masked(rows, record)
        except InputError as error:
            raise InputError(f"{record.place}: {error}") from error
        except RecursionError:
            raise InputError(f"{record.place}: nested too deeply.") from None
        n_before = len(examples)
        for tokens in masked:
            trained = tokens.trained[: settings.max_length]
            lengths.append(len(tokens.ids))
            if any(trained):
                examples.append(_example(tokens, row, len(examples), settings.max_length))
            elif any(tokens.trained):
                reason = _TOO_LONG
        if len(examples) == n_before:
            left_out.append(LeftOut(row, reason))
    summary = DataSummary(
        data_format=data_format,
        n_examples=len(examples),
        n_tokens=sum(len(example.ids) for example in examples),
        n_trained_tokens=sum(int(example.trained.sum()) for example in examples),
        n_cut=sum(length > settings.max_length for length in lengths),
        n_untrained=len(left_out),
        longest=max(lengths, default=0),
        max_length=settings.max_length,
        n_rows=len(records),
        left_out=Counter(one.reason for one in left_out),
        ignored=tuple(dict.fromkeys(name for record in records for name in record.ignored)),
        dated=rows.is_dated,
    )
    return LoadedData(examples, [one.place for one in records], lengths, left_out, summary)


def _check_settings_of_chats(settings: DataConfig, data_format: str) -> None:
    """Refuses what would do nothing.

    Raises:
        InputError: a setting is given that only chats have a use for.
    """
    for name in ("chat_template", "chat_template_kwargs", "roles_to_train"):
        if getattr(settings, name) != type(settings).model_fields[name].default:
            raise InputError(
                f"data.{name} is for chats, and the rows are of the format {data_format}: leave it "
                "out, or write the rows as messages."
            )


def printable(text: str) -> str:
    """A text without what a terminal would obey: other characters than printable ones escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _masked(rows: RowTokenizer, record: Record) -> tuple[list[MaskedTokens], str]:
    """A record's tokens, and why it is left out if none of them is trained."""
    columns = record.columns
    if columns.get("weight") == 0 or columns.get("train") is False:
        return [], _NO_WEIGHT
    return rows.tokenize(columns), _UNTRAINED


def _example(tokens: MaskedTokens, row: int, index: int, max_length: int) -> Example:
    # A row that loses only what isn't trained, as ChatML's last line break, is whole.
    cut = any(tokens.trained[max_length:])
    ids = np.array(tokens.ids[:max_length], dtype=np.int32)
    trained = np.array(tokens.trained[:max_length], dtype=np.bool_)
    n_cut = max(0, len(tokens.ids) - max_length)
    return Example(ids, trained, index, cut, row, tokens.turn, n_cut)


class RowTokenizer:
    """Turns records of one format into tokens.

    Args:
        settings: the config's `data:`.
        tokenizer: the model's.
        data_format: of the records.
        now: what chat templates take for the time; None for the clock.

    Raises:
        InputError: data.chat_template or data.chat_template_kwargs is wrong.
    """

    def __init__(
        self,
        settings: DataConfig,
        tokenizer: TextTokenizer,
        data_format: str,
        now: datetime | None = None,
    ) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._data_format = data_format
        self._template: ChatTemplate | None = None
        if data_format in ("chat", "instruct"):  # Jinja2 is imported for these only
            self._template = chat_template(settings, tokenizer, now)
        ends = (tokenizer.decode([t], skip_special=False) for t in tokenizer.end_of_turn_ids)
        self._end_texts = sorted(filter(None, ends))

    @property
    def is_dated(self) -> bool:
        """Whether the template may write the time."""
        return self._template is not None and self._template.is_dated

    def tokenize(self, columns: Mapping[str, Any]) -> list[MaskedTokens]:
        """The examples of a record, before cutting; the first token of none is trained.

        Raises:
            InputError: the row can't be rendered, or has something that its rendering doesn't.
        """
        settings, tokenizer = self._settings, self._tokenizer
        if self._data_format == "chat" or (self._data_format == "instruct" and self._template):
            masked = self._conversation(columns)
        else:
            prompt, answer = self._plain(columns)
            masked = [mask_text(prompt, answer, settings, tokenizer)]
        masked = train_ends(masked, settings, tokenizer)
        for tokens in masked:
            tokens.trained[:1] = [False] * len(tokens.trained[:1])
        return masked

    def _conversation(self, columns: Mapping[str, Any]) -> list[MaskedTokens]:
        if self._template is None:
            raise InputError(
                "The model has no chat template. Give one with data.chat_template, use a model "
                "that has one, name its tokenizer with model.tokenizer, or write the data as "
                "prompt and completion."
            )
        conversation = conversation_of(columns, self._data_format)
        rendered = render_turns(conversation, self._template, self._settings, self._end_texts)
        return mask_conversation(rendered, self._settings, self._tokenizer)

    def _plain(self, columns: Mapping[str, Any]) -> tuple[str, str]:
        """Prompt and answer without a chat template around them."""
        if self._data_format == "completion":
            return columns["prompt"], columns["completion"]
        if self._data_format == "text":
            return "", columns["text"]
        for name in ("system", "history", "tools", "chat_template_kwargs"):
            if name in columns:
                raise InputError(
                    f"{name} needs a chat template, and the model has none: give one with "
                    "data.chat_template, or leave it out."
                )
        return "".join(part + "\n\n" for part in instruction_parts(columns)), columns["output"]


def chat_template(
    settings: DataConfig, tokenizer: TextTokenizer, now: datetime | None = None
) -> ChatTemplate | None:
    """The template that chats are written with: data.chat_template's, or else the model's.

    Raises:
        InputError: data.chat_template is no file and no template, or the template reads no
            variable of the name of one in data.chat_template_kwargs.
    """
    from lora.forward.text.chat_template import ChatTemplate

    source = settings.chat_template
    found = ChatTemplate.of(
        tokenizer,
        None if source is None else template_source(source),
        arguments=settings.chat_template_kwargs,
        now=now,
    )
    for name in settings.chat_template_kwargs:
        if found is None:
            raise InputError("data.chat_template_kwargs: the model has no chat template.")
        if name not in found.optional_variables:
            raise InputError(f"data.chat_template_kwargs: {unread_argument(name, found)}")
    return found


def template_source(value: str) -> str:
    """The template that data.chat_template names or is.

    Raises:
        InputError: it is no file, and no text of a template either.
    """
    if "{{" in value or "{%" in value:
        return value
    from lora.forward.text.tokenizer import read_template

    if not Path(value).is_file():
        raise InputError(f"data.chat_template: {value}: there is no such file.")
    return read_template(Path(value))
