"""Messages to text, by the chat template inside the model.

Rendered as transformers does (utils/chat_template_utils.py, `_compile_jinja_template`), because
the templates are written for it. A template comes out of a downloaded file: it runs in Jinja's
sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lora.shaders.errors import InputError


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    bos_token: str | None,
    eos_token: str | None,
) -> str:
    """Renders messages into the text that the model was trained on.

    Args:
        template: the Jinja template, `Tokenizer.chat_template`.
        messages: each with `role` and `content`, and whatever else the template reads.
        add_generation_prompt: ends with the opening of an assistant's turn.
        bos_token, eos_token: their text, for templates that write them; None leaves the name
            undefined, which renders as nothing.

    Raises:
        InputError: the template is no Jinja, or refuses the messages.
    """
    special_tokens = {"bos_token": bos_token, "eos_token": eos_token}
    variables = {name: text for name, text in special_tokens.items() if text is not None}
    compiled = _compile(template)
    try:
        # tools and documents are given as None and not left out: templates ask `tools is none`.
        return compiled.render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
    except Exception as error:  # a template is a program: it may raise anything
        raise InputError(
            f"The chat template refused the messages: {_reason(error)}. Check their roles and "
            "fields."
        ) from error


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template)
    except Exception as error:  # besides TemplateSyntaxError, RecursionError and the like
        raise InputError(f"The chat template is not valid Jinja: {_reason(error)}.") from error


class _GenerationBlock(Extension):
    """{% generation %} … {% endgeneration %}, transformers' mark around what is trained on.

    The text inside is rendered as if the mark were not there.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _reason(error: Exception) -> str:
    """The error's text as part of a sentence."""
    return (str(error) or type(error).__name__).rstrip(".")
