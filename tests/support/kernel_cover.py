"""A pytest plugin that shows whose kernels other tests have, too.

    python -m pytest -n auto --dist loadfile -p tests.support.kernel_cover

Numbers aside, every line of the kernels of the tests that it lists is in some kernel of a test that
it does not list; those with most text of their own come first. Without them all a driver would
compile less and no line of a kernel would be left out. It knows nothing of values: sizes at an edge
and runs that others continue are for whoever reads it (`tests/support/long_cases.py`).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import pytest

from lora.shaders import device
from lora.shaders.device import Device

_COMMENT, _NUMBER = re.compile(r"//.*"), re.compile(r"\d+")
_OUTPUT = "kernels' lines"
_LEAST = 10_000  # characters of its own that a test must have to be listed

Kernels = dict[str, dict[int, int]]  # of each test the sizes of its kernels' texts
Lines = dict[int, list[int]]  # of each kernel

_kernels: Kernels = defaultdict(dict)
_lines: Lines = {}
_texts: dict[tuple[str, str], tuple[int, int]] = {}  # by template and constants: key and size
_test = ""
_render, _make_pipeline = device.render, Device.pipeline


def _key(text: str) -> int:
    """Stands for a text: 64 bits, so that none of some ten thousand are taken for each other."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def _place(template: str, constants: dict[str, Any]) -> tuple[str, str]:
    return template, repr(sorted(constants.items()))


def _noted_render(template: str, constants: dict[str, Any]) -> str:
    text = _render(template, constants)
    key = _key(text)
    _kernels[_test][key] = len(text)
    _texts[_place(template, constants)] = key, len(text)
    if key not in _lines:
        plain = _NUMBER.sub("0", _COMMENT.sub("", text))
        lines = {line.strip() for line in plain.splitlines()}
        _lines[key] = sorted(_key(f"{template} {line}") for line in lines)
    return text


def _noted_pipeline(self: Device, template: str, constants: dict[str, Any]) -> Any:
    """Of a test is also what the device that all share had from tests before it."""
    pipeline = _make_pipeline(self, template, constants)
    key, size = _texts[_place(template, constants)]  # rendered when the device first had it
    _kernels[_test][key] = size
    return pipeline


def listed(kernels: Mapping[str, Mapping[int, int]], lines: Lines) -> dict[str, int]:
    """The tests to be listed, with the characters of kernels that each alone has then."""
    users = Counter(key for own in kernels.values() for key in own)
    of_test = {test: {line for key in own for line in lines[key]} for test, own in kernels.items()}
    covered = Counter(line for own in of_test.values() for line in own)

    def own_text(test: str) -> int:
        return sum(size for key, size in kernels[test].items() if users[key] == 1)

    found = {}
    for test in sorted(kernels, key=own_text, reverse=True):
        text = own_text(test)  # of what was listed meanwhile nothing counts
        if text >= _LEAST and all(covered[line] > 1 for line in of_test[test]):
            found[test] = text
            users.subtract(kernels[test].keys())
            covered.subtract(of_test[test])
    return found


def pytest_configure(config: pytest.Config) -> None:
    device.render = _noted_render
    Device.pipeline = _noted_pipeline  # type: ignore[method-assign]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    global _test
    _test = item.nodeid
    return (yield)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands over what it noted, in types that execnet carries."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        kernels = [(test, list(own.items())) for test, own in _kernels.items()]
        output[_OUTPUT] = (kernels, list(_lines.items()))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    kernels, lines = getattr(node, "workeroutput", {}).get(_OUTPUT, ((), ()))
    for test, own in kernels:
        _kernels[test].update(own)
    _lines.update(lines)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("tests whose kernels' lines others have")
    sizes = {key: size for own in _kernels.values() for key, size in own.items()}
    terminalreporter.line(f"{len(sizes)} kernels of {sum(sizes.values())} characters")
    for test, text in listed(_kernels, _lines).items():
        terminalreporter.line(f"{text:9}  {test}")
