"""Rows to tokens: rendered by a chat template where they are chats, tokenized, masked.

Messages become text in lora/data/turns.py and text becomes tokens in lora/data/masks.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora.data.conversations import conversation_of, instruction_parts
from lora.data.masks import (
    MaskedTokens,
    TextTokenizer,
    mask_conversation,
    mask_text,
    train_ends,
)
from lora.data.turns import render_turns, unread_argument
from lora.shaders.errors import InputError

if TYPE_CHECKING:
    from lora.config.data_section import DataConfig
    from lora.forward.text.chat_template import ChatTemplate


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

    @property
    def written_date(self) -> str:
        """What the template may write of the time; "" for nothing."""
        return "" if self._template is None else self._template.written_date

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
    from lora.forward.text.configured import read_template

    if not Path(value).is_file():
        raise InputError(f"data.chat_template: {value}: there is no such file.")
    return read_template(Path(value))
