"""Inputs made wrong by a seeded random: bytes, words, values of JSON, numbers of a header.

One seed gives one input, so that what is found can be found again.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

_BYTES = (0, 1, 9, 10, 13, 27, 34, 39, 91, 92, 123, 127, 128, 155, 237, 255)
_INTEGERS = (0, 1, 2, 7, 8, 127, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
_WORDS = (
    "1e999", "-1", "0", "1", "9" * 30, "9" * 5000, "1e308", "1e-308", "null", "true", "NaN",
    "-Infinity", "[", "]", "{", "}", "[[[[", '"', "'", ":", ": ", ",", "&a ", "*a", "<<: ",
    "!!python/name:os.system ", "\x1b[2J", "\x9b2J", "\ud800", "\\ud800", "\u2028", "\u202e", "\0",
    "é", "🙂", "\n", "\r", "\t", " " * 99, "(a+)+b", "(", "{{", "}}", "{%", "%}", "{{ 9**9 }}",
    "|tojson", "|join", ".__class__", "*", "**", "~", "range(9999)", "loop", "messages", "content",
    "../..", "/dev/zero", "%s", "1:1:1:1",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 10**12, 0.5, -0.0, 1e308, 1e-308,
    float("inf"), float("nan"), "", "x", "1", "\x1b[2J", "\ud800", "a" * 3000, "(a|b)*", [], {},
    [[]], [None], {"": None}, ["x", 1, None], {"x": {"y": []}}, [[[[[[[[1]]]]]]]],
    "{{ messages }}", "../../etc/passwd",
)  # fmt: skip

Mutator = Callable[[random.Random, bytes, Sequence[bytes]], bytes]


def mutated_bytes(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """Some bytes are changed, put in, taken out, doubled, cut off, or another seed's."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        start = rng.randrange(len(data) + 1)
        stop = min(len(data), start + rng.choice((1, 1, 2, 4, 8, 64)))
        kind = rng.randrange(7)
        if kind == 0 and start < len(data):
            data[start] ^= 1 << rng.randrange(8)
        elif kind == 1 and start < len(data):
            data[start] = rng.choice(_BYTES)
        elif kind == 2:
            data[start:start] = bytes(rng.choice(_BYTES) for _ in range(rng.randrange(1, 5)))
        elif kind == 3:
            del data[start:stop]
        elif kind == 4:
            data[start:start] = data[start:stop] * rng.choice((1, 2, 50))
        elif kind == 5 and rng.random() < 0.3:
            del data[start:]
        elif kind == 6:
            other = rng.choice(seeds)
            place = rng.randrange(len(other) + 1)
            data[start:stop] = other[place : place + rng.choice((4, 32, 256))]
    return bytes(data)


def mutated_words(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """A text gets words that mean something to a parser, or bytes change."""
    if rng.random() < 0.3:
        return mutated_bytes(rng, content, seeds)
    text = content.decode(errors="surrogateescape")
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        start = rng.randrange(len(text) + 1)
        stop = start + rng.choice((0, 0, 1, 1, 4, 12))
        text = text[:start] + rng.choice(_WORDS) * rng.choice((1, 1, 1, 2, 40)) + text[stop:]
    return text.encode(errors="surrogatepass")


def mutated_json(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """Values of JSON become others of other types, keys go or get other names."""
    if rng.random() < 0.25:
        return mutated_words(rng, content, seeds)
    lines = content.decode().splitlines() or [""]
    place = rng.randrange(len(lines))
    try:
        values = json.loads(lines[place])
    except ValueError:
        return mutated_words(rng, content, seeds)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        values = _changed(rng, values)
    lines[place] = json.dumps(values, ensure_ascii=rng.random() < 0.7)
    return "\n".join(lines).encode(errors="surrogatepass")


def _changed(rng: random.Random, values: Any) -> Any:
    """The same with one value, somewhere within, changed."""
    if isinstance(values, dict) and values and rng.random() < 0.9:
        key = rng.choice(list(values))
        kind = rng.random()
        rest = {name: value for name, value in values.items() if name != key}
        if kind < 0.1:
            return rest
        if kind < 0.15:
            return rest | {rng.choice(("", "x", "\x1b[2J", "a" * 500)): values[key]}
        return values | {key: _changed(rng, values[key])}
    if isinstance(values, list) and values and rng.random() < 0.8:
        place = rng.randrange(len(values))
        if rng.random() < 0.2:
            return values[:place] + values[place + 1 :]
        if rng.random() < 0.2:
            return values[: place + 1] * rng.choice((2, 30))
        return [*values[:place], _changed(rng, values[place]), *values[place + 1 :]]
    return rng.choice(_VALUES)


def mutated_header(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """Numbers of 32 and 64 bits become others, mostly near the beginning; or bytes change."""
    if rng.random() < 0.4:
        return mutated_bytes(rng, content, seeds)
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        end = len(data) if rng.random() < 0.2 else max(64, len(data) // 3)
        start = rng.randrange(max(1, min(end, len(data)) - 8))
        value = rng.choice(_INTEGERS) if rng.random() < 0.5 else rng.randrange(13)
        if rng.random() < 0.5:
            data[start : start + 4] = struct.pack("<I", value & 0xFFFFFFFF)
        else:
            data[start : start + 8] = struct.pack("<Q", value)
    return bytes(data)
