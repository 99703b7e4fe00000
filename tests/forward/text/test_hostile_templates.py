"""Chat templates that are attacks: what they may read, how long they run, what they write."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora.forward.text.chat_template import ChatTemplate
from lora.shaders.errors import InputError
from tests.support.imports import REPOSITORY

MESSAGES = [{"role": "user", "content": "Hi"}]

# Ways out of Jinja's sandbox that were published, and variations on them: each would write a
# secret, or what only something outside the sandbox has.
ESCAPES = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "attr by item": "{{ ''['__class__'] }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of a global": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "joiner": "{{ joiner.__init__.__globals__ }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "self": "{{ self._TemplateReference__context }}",
    "self by init": "{{ self.__init__.__globals__ }}",
    "request": "{{ messages.__class__.__base__.__subclasses__() }}",
    "bound method": "{{ strftime_now.__self__.__class__.__mro__ }}",
    "generator frame": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "coroutine frame": "{{ (messages|select).gi_code.co_consts }}",
    "str.format, CVE-2016-10745": "{{ '{0.__class__.__init__.__globals__}'.format(namespace) }}",
    "str.format_map, CVE-2019-10906": "{{ '{a.__class__.__mro__}'.format_map({'a': 7}) }}",
    "format kept in a filter, CVE-2024-56326": (
        "{% set f = '{0.__class__.__mro__}'.format %}{{ [7]|map(f)|list }}"
    ),
    "format by a macro, CVE-2024-56326": (
        "{% macro call(f) %}{{ f(7) }}{% endmacro %}{{ call('{0.__class__.__mro__}'.format) }}"
    ),
    "attr filter's format, CVE-2025-27516": "{{ ('{0.__class__.__mro__}'|attr('format'))(7) }}",
    "map's attribute": "{{ [7]|map(attribute='__class__.__mro__')|list }}",
    "groupby's attribute": "{{ [7]|groupby('__class__')|list }}",
    "sort's attribute": "{{ [7, 8]|sort(attribute='__class__.__mro__')|list }}",
    "sum's attribute": "{{ [7]|sum(attribute='__class__') }}",
    "selectattr": "{{ [7]|selectattr('__class__.__mro__')|list }}",
    "import": "{% import 'os' as os %}{{ os.name }}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "change of an argument": "{{ messages.append('LEAKED') }}{{ messages }}",
    "change of a mapping": "{{ messages[0].update({'a': 'LEAKED'}) }}{{ messages }}",
    "python block": "{% do messages.clear() %}",
}  # fmt: skip
_LEAK = re.compile(
    r"<class|<module|<function|<built-in|root:|uid=|/bin/|frame object|<Template|LEAKED"
)


def escapes(sources: dict[str, str]) -> list[str]:
    """Which templates give away something that the sandbox keeps."""
    found = []
    for name, source in sources.items():
        try:
            text = ChatTemplate(source).render(MESSAGES).text
        except InputError:
            continue
        if _LEAK.search(text):
            found.append(f"{name}: {text[:80]}")
    return found


def test_published_escapes_stay_inside() -> None:
    assert escapes(ESCAPES) == []


def test_the_leak_would_be_seen() -> None:
    assert escapes({"class": "{{ '<class int>' }}"}) != []


def test_published_escapes_stay_inside_under_the_lowest_jinja(tmp_path: Path) -> None:
    """By the lowest version that pyproject.toml allows, fetched for this test."""
    (lowest,) = re.findall(r'"jinja2>=([\d.]+)"', (REPOSITORY / "pyproject.toml").read_text())
    place = os.environ.get("LORA_LOWEST_JINJA")
    if place is None and importlib.metadata.version("jinja2") != lowest:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--target", str(tmp_path), f"jinja2=={lowest}"]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("pip can't fetch it here")
        place = str(tmp_path)
    code = (
        "import json, sys, jinja2; from importlib.metadata import version\n"
        "from tests.forward.text.test_hostile_templates import ESCAPES, escapes\n"
        "print(json.dumps([version('jinja2'), escapes(ESCAPES)]))"
    )
    paths = [place] if place else []
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([*paths, str(REPOSITORY)]))
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(shown.stdout) == [lowest, []]


# Templates that never end or fill the memory; a child of 2 GiB and 2 seconds holds each.
BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "list": "{{ [0] * 10**9 }}",
    "text": "{{ 'a' * 10**10 }}",
    "doubling": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "power": "{{ 9**(9**9) }}",
    "padding": "{{ '%999999999999d' % 1 }}",
    "center": "{{ 'a'|center(10**11) }}",
    "indent": "{{ ('a\n' * 10**6)|indent(10**5) }}",
    "writes on and on": "{% for a in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long sum": "{{ " + "+".join(["1"] * 20000) + " }}",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_one_sentence_in_good_time(name: str) -> None:
    started = time.perf_counter()
    with pytest.raises(InputError) as caught:
        ChatTemplate(BOMBS[name]).render(MESSAGES)
    assert time.perf_counter() - started < 20  # 2 seconds of a processor that others use, too
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_variables_of_a_bomb_are_read_within_limits() -> None:
    with pytest.raises(InputError):
        _ = ChatTemplate("{{ 9**(9**9) }}{{ x }}" + "{% if x %}" * 3000).variables


def test_long_honest_renderings_are_written() -> None:
    messages = [{"role": "user", "content": "word " * 1_000_000}] * 3
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}")
    assert len(template.render(messages).text) == 30_000_000
