"""Which chat template a conversation is written with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from lora.adapters.origin import origin_of
from lora.forward.gguf.file import GGUFFile
from lora.forward.text.chat_template import ChatTemplate
from lora.forward.text.tokenizer import Tokenizer
from lora.generation.prompts import check_has_template
from lora.storage.stores import resolve_model


def check_can_chat(model: str, tokenizer: str | None = None, adapters: Iterable[Path] = ()) -> None:
    """Refuses a model that has no chat template, out of its header: before it is loaded.

    Args:
        model: a GGUF file, or a name as in model.path.
        tokenizer: a tokenizer.json in place of the GGUF's own.
        adapters: one of them may have been trained with a template.

    Raises:
        InputError: there is none, or a file can't be read.
    """
    if any(origin.template_file for origin in map(origin_of, adapters) if origin is not None):
        return
    gguf_file = GGUFFile(resolve_model(model))
    if tokenizer is None:
        check_has_template(gguf_file.metadata.get("tokenizer.chat_template"))
    else:
        check_has_template(Tokenizer.from_file(tokenizer, gguf_file=gguf_file).chat_template)


def trained_templates(
    tokenizer: Tokenizer, adapters: Mapping[str, Path]
) -> dict[str, ChatTemplate]:
    """What chats with each adapter are written with, by its run's config.

    Adapters that don't come with one, such as GGUF adapters, are left out.

    Raises:
        InputError: an adapter's template isn't there any more.
    """
    origins = {name: origin_of(path) for name, path in adapters.items()}
    found = {n: o.chat_template(tokenizer) for n, o in origins.items() if o is not None}
    return {name: template for name, template in found.items() if template is not None}
