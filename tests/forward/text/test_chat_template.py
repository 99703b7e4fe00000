"""Chat templates: as transformers renders them, and errors as sentences."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from lora.forward.text.chat_template import ChatTemplate
from lora.shaders.errors import InputError
from tests.support.tiny_gguf import CHATML

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<Hello> & é"}]


def _template(source: str, **given: Any) -> ChatTemplate:
    return ChatTemplate(source, **{"bos_token": "<s>", "eos_token": "</s>", **given})


def _render(source: str, messages: Any = None, **options: Any) -> str:
    return _template(source).render(MESSAGES if messages is None else messages, **options).text


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


def test_generation_blocks_are_rendered_as_their_text_and_their_places_are_known() -> None:
    template = _template(
        "{% for m in messages %}a{%- generation %} {{ m.content }}{% endgeneration -%} b"
        "{% endfor %}"
    )
    rendering = template.render(MESSAGES)
    assert rendering.text == "a Hiba <Hello> & éb"
    assert rendering.said == [(1, 4), (6, 18)]
    assert [rendering.text[start:end] for start, end in rendering.said] == [" Hi", " <Hello> & é"]
    assert _template(CHATML).render(MESSAGES).said is None


def test_generation_blocks_are_where_transformers_finds_them() -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    # What is set inside a block is not seen outside.
    template = (
        "{% set x = 1 %}{% for m in messages %}[{{ m.role }}]{% generation %}{% set x = 2 %}"
        "{{ m.content }}{% endgeneration %}{{ x }}{% endfor %}"
    )
    theirs, said = utilities.render_jinja_template(
        [MESSAGES], chat_template=template, return_assistant_tokens_mask=True
    )
    rendering = _template(template).render(MESSAGES)
    assert (rendering.text, rendering.said) == (theirs[0], said[0])


def test_marks_of_ours_in_a_text_are_refused() -> None:
    template = _template("{% generation %}{{ messages[0].content }}{% endgeneration %}")
    with pytest.raises(InputError, match="hold U.FDD0 or U.FDD1, which are no characters"):
        template.render([{"role": "user", "content": "a\ufdd0b"}])
    assert _render("{{ messages[0].content }}", [{"content": "a\ufdd0b"}]) == "a\ufdd0b"


def test_absent_special_tokens_render_as_nothing() -> None:
    assert ChatTemplate("[{{ bos_token }}{{ eos_token }}]").render(MESSAGES).text == "[]"


def test_arguments_are_variables_and_a_rows_come_before_the_configs() -> None:
    template = _template("{{ a }} {{ enable_thinking }}", arguments={"a": "of all"})
    assert template.render(MESSAGES).text == "of all False"
    reads = _template("{{ enable_thinking }}{{ messages[1].reasoning_content }}")
    assert reads.render(MESSAGES).text == "True"
    assert template.render(MESSAGES, arguments={"a": 1, "enable_thinking": False}).text == "1 False"
    assert template.optional_variables == ["a", "enable_thinking"]


def test_the_time_is_the_given_one() -> None:
    then = datetime(2026, 11, 29, 23, 59)
    template = _template(
        "{{ strftime_now('%d.%m.%Y') }} {{ date_string }} {{ datetime }}", now=then
    )
    assert template.render(MESSAGES).text == "29.11.2026 29 Nov 2026 Nov 29 2026"
    assert template.optional_variables == ["date_string", "datetime"]
    given = {"date_string": "26 Jul 2024"}
    assert template.render(MESSAGES, arguments=given).text == "29.11.2026 26 Jul 2024 Nov 29 2026"
    assert _render("{{ strftime_now('%Y') }}") == str(datetime.now().year)


def test_white_space_is_stripped_as_by_llama_cpp() -> None:
    messages = [{"role": "user", "content": " \t\u00a0Hi\u00a0\r\n"}]
    for strips, expected in (
        ("| trim", "\u00a0Hi\u00a0"),
        (".strip()", "\u00a0Hi\u00a0"),
        (".lstrip()", "\u00a0Hi\u00a0\r\n"),
        (".rstrip()", " \t\u00a0Hi\u00a0"),
        (".strip('\\n')", " \t\u00a0Hi\u00a0\r"),
        ("| trim('\\n')", " \t\u00a0Hi\u00a0\r"),
        (".strip().replace('H', 'h')", "\u00a0hi\u00a0"),
    ):
        assert _render("{{ messages[0].content" + strips + " }}", messages) == expected


def test_a_template_for_tools_is_taken_for_rows_that_have_some() -> None:
    template = _template("plain", tool_use_source="{{ tools[0].name }}")
    assert template.render(MESSAGES).text == "plain"
    assert template.render(MESSAGES, tools=[{"name": "weather"}]).text == "weather"


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
