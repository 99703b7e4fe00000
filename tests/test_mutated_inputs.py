"""A fortieth of the mutated inputs that docs/reliability.md counts: no traceback, hang or peak."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora.shaders.errors import InputError
from tests.support.fuzzed_parsers import PARSERS, Parser, fuzz, input_of
from tests.support.mutations import mutated_bytes

_INPUTS = 5_000


def test_all_shares_are_given_out() -> None:
    assert sum(parser.share for parser in PARSERS) == pytest.approx(1.0)


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_mutated_inputs_are_read_or_refused(parser: Parser) -> None:
    n = round(_INPUTS * parser.share)
    found = fuzz(parser, range(n))
    assert found.wrong == []
    assert found.read + found.refused == n
    # Seeds that are refused as they are, or mutations that change nothing, would test nothing.
    assert found.read > n // 50 and found.refused > n // 50


def test_one_number_gives_one_input() -> None:
    for parser in PARSERS:
        assert input_of(parser, 7) == input_of(parser, 7) != input_of(parser, 8)


def test_findings_are_found() -> None:
    def read(folder: Path, content: bytes) -> object:
        if b"e" in content:
            raise InputError("a file\x9b")  # made plain where it is raised
        if b"d" in content:
            raise KeyError("d")
        return bytearray(len(content))

    parser = Parser("x", 1.0, mutated_bytes, lambda: [b"abcd", b"abce", b"abc"], read)
    found = fuzz(parser, range(200))
    assert found.read > 0 and found.refused > 0
    assert found.wrong and all("KeyError" in line for line in found.wrong)
