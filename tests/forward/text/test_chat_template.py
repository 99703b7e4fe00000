"""Chat templates: as transformers renders them, and errors as sentences."""

from __future__ import annotations

from typing import Any

import pytest

from lora.forward.text.chat_template import render_chat
from lora.shaders.errors import InputError
from tests.support.tiny_gguf import CHATML

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<Hello> & é"}]


def _render(template: str, messages: Any = None, **options: Any) -> str:
    defaults: dict[str, Any] = {
        "add_generation_prompt": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    return render_chat(template, MESSAGES if messages is None else messages, **defaults | options)


def test_chatml() -> None:
    turns = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<Hello> & é<|im_end|>\n"
    assert _render(CHATML) == turns
    assert _render(CHATML, add_generation_prompt=True) == turns + "<|im_start|>assistant\n"


# A template with all that transformers' environment adds to plain Jinja.
EVERYTHING = """{{ bos_token }}
{% set ns = namespace(n=0) %}
{% for message in messages %}
    {% set ns.n = ns.n + 1 %}
    {% if message.role == 'skip' %}
        {% continue %}
    {% endif %}
    {{- message | tojson }}|{{ message.content | tojson(indent=2) }}
{% endfor %}
{% if tools is none and documents is none %}no tools{% endif %}
{{ ns.n }}{{ strftime_now('%%') }}{{ undefined_name }}{{ eos_token }}
"""


def test_agrees_with_transformers() -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [*MESSAGES, {"role": "skip", "content": "x"}]
    for template in (CHATML, EVERYTHING):
        theirs, _ = utilities.render_jinja_template(
            [messages], chat_template=template, bos_token="<s>", eos_token="</s>"
        )
        assert _render(template, messages) == theirs[0]


def test_generation_blocks_are_rendered_as_their_text() -> None:
    template = "a{% generation %}{{ messages[0].content }}{% endgeneration %}b"
    assert _render(template) == "aHib"


def test_absent_special_tokens_render_as_nothing() -> None:
    assert _render("[{{ bos_token }}{{ eos_token }}]", bos_token=None, eos_token=None) == "[]"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for x in %}", "not valid Jinja"),
        ("{{ raise_exception('Roles must alternate!') }}", "refused the messages: Roles must"),
        ("{{ messages[0].content + 1 }}", "refused the messages: can only concatenate"),
        ("{{ messages[0]['name']['first'] }}", "refused the messages"),
        ("{{ 1 / 0 }}", "refused the messages: division by zero"),
        ("{{ messages.append(1) }}", "refused the messages"),
        ("{{ ''.__class__.__mro__ }}", "refused the messages"),
    ],
)
def test_errors_are_sentences(template: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _render(template)
