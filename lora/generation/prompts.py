"""Prompts as token ids: a text, ids, or messages written with a chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora.forward.text.tokenizer import Tokenizer
from lora.shaders.errors import InputError

if TYPE_CHECKING:  # Jinja2 is loaded for chats only
    from lora.forward.text.chat_template import ChatTemplate

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


def is_tokens(prompt: Prompt) -> bool:
    """Whether a prompt is a text or token ids, and no messages."""
    return isinstance(prompt, str) or not any(isinstance(one, Mapping) for one in prompt)


def prompt_ids(
    tokenizer: Tokenizer,
    prompt: Prompt,
    template: ChatTemplate | None = None,
    *,
    add_bos: bool | None = None,
) -> list[int]:
    """A prompt as token ids.

    Args:
        tokenizer: the model's.
        prompt: a text; token ids; or messages, [{"role": "user", "content": "Hi"}].
        template: what messages are written with; None for the model's.
        add_bos: for a text, whether BOS comes before it; None: as the model wants it.

    Raises:
        InputError: messages are given and there is no chat template, or it refuses them.
    """
    if isinstance(prompt, str):
        return list(tokenizer.encode(prompt, add_bos=add_bos).ids)
    if not is_tokens(prompt):
        return conversation_ids(tokenizer, prompt, template)  # type: ignore[arg-type]
    return list(prompt)  # type: ignore[arg-type]


def check_has_template(template: str | None) -> str:
    """The chat template of a model; refuses one that has none.

    Raises:
        InputError: it is None.
    """
    if template is None:
        raise InputError(
            "The model holds no chat template, so it cannot chat; continue texts with it: "
            "lora generate, without --chat."
        )
    return template


def conversation_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    template: ChatTemplate | None = None,
) -> list[int]:
    """A conversation as token ids, up to where the next answer begins.

    Args:
        tokenizer: the model's.
        messages: of the conversation, in the form of a row's for training.
        template: an adapter's; None for the model's.

    Raises:
        InputError: there is no chat template, or it refuses the messages.
    """
    from lora.data.conversations import conversation_of
    from lora.data.records import check_record
    from lora.data.shapes import Shape
    from lora.forward.text.chat_template import ChatTemplate

    if template is None:
        check_has_template(tokenizer.chat_template)
        template = ChatTemplate.of(tokenizer)
    assert template is not None
    record = check_record({"messages": [dict(m) for m in messages]}, Shape("chat"))
    conversation = conversation_of(record.columns, "chat")
    refused: InputError | None = None
    for form in conversation.forms:
        try:
            rendering = template.render(conversation.in_form(form), add_generation_prompt=True)
        except InputError as error:
            refused = refused or error
            continue
        # The template may write BOS; where it does not and the model wants it, it is put there.
        return tokenizer.encode(rendering.text).ids
    assert refused is not None  # there is always a form
    raise refused
