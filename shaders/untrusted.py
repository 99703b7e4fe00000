"""What comes out of files that nobody vouches for: read within bounds, refused in one sentence.

Every parser of a file begins here: a text has a largest size, JSON a depth, a number a range, and
whatever a library raises on the way is an InputError that names the file. What messages show of a
file holds nothing that a terminal would obey (`plain`).
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora.shaders.errors import InputError, plain

MOST_SETTINGS_BYTES = 1 << 22  # of a JSON file of settings; tokenizer_config.json may have 1 MB
MOST_DEPTH = 200  # of JSON; Python's own parser stops at its recursion limit, wherever that stands
MOST_RANK = 1 << 16  # of an adapter: more than any matrix has columns
MOST_LARGE = 2**31 - 1  # counts beyond it are no i32, which kernels and files count in
F32_MOST = 3.4028234663852886e38
F32_LEAST = 1.1754943508222875e-38  # below it a number is flushed to zero on some devices


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict, self.maxtuple = 2, 6, 6, 6
        self.maxstring, self.maxother, self.maxlong = 60, 60, 40

    def repr_int(self, x: int, level: int) -> str:
        """A number, or how long it is: thousands of digits are not even written out."""
        bits = x.bit_length()
        return repr(x) if bits <= 128 else f"a whole number of {bits} bits"


_SHOWN = _Shown()


def shown(value: Any, most: int = 60) -> str:
    """A value as it stands in a message: short whatever its size, and of printable characters."""
    text = plain(_SHOWN.repr(value))
    return text if len(text) <= most else text[: most - 3] + "..."


def read_text(
    path: Path, most_bytes: int = MOST_SETTINGS_BYTES, no_text: str = "not a text file in UTF-8"
) -> str:
    """The text of a small file.

    Args:
        no_text: what is said of one that is none.

    Raises:
        InputError: it is not there, can't be read, is larger than that, or no UTF-8.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(most_bytes + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file.") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: cannot be read ({reason}).") from None
    if len(content) > most_bytes:
        raise InputError(
            f"{path}: is larger than {most_bytes:,} bytes, more than any such file has; it is "
            "another kind of file."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: {no_text}.") from None


def parse_json(text: str | bytes, source: object, *, finite: bool = True) -> Any:
    """What a JSON text says.

    Args:
        source: where it comes from, for messages.
        finite: refuses NaN and Infinity, which are no JSON, and numbers too large for a float.

    Raises:
        InputError: it is no JSON, is nested deeper than MOST_DEPTH, or holds half a surrogate pair.
    """
    try:
        values = json.loads(text, parse_constant=_refuse_constant if finite else None)
        _check_values(values, finite)
    except UnicodeDecodeError:
        raise InputError(f"{source}: not text in UTF-8; save it as UTF-8.") from None
    except RecursionError:
        raise InputError(f"{source}: nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{source}: not JSON ({error.msg}, line {error.lineno}).") from None
    except ValueError as error:
        # Besides our own: json has no class for numbers with thousands of digits.
        reason = "a number in it is too long" if "digits" in str(error) else str(error)
        raise InputError(f"{source}: not JSON that can be used ({reason}).") from None
    return values


def read_json_object(path: Path, most_bytes: int = MOST_SETTINGS_BYTES) -> dict[str, Any]:
    """The object that a small JSON file holds.

    Raises:
        InputError: as `read_text` and `parse_json`, or its top is no object.
    """
    values = parse_json(read_text(path, most_bytes), path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds {shown(values)}, where a JSON object is expected.")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} stands in it")


def _check_values(values: Any, finite: bool) -> None:
    """Walks what was parsed, without recursion.

    Raises:
        RecursionError: it is too deep.
        ValueError: a number is infinite, or a text holds half a surrogate pair.
    """
    left = [(values, 0)]
    while left:
        value, depth = left.pop()
        if depth > MOST_DEPTH:
            raise RecursionError
        if isinstance(value, dict):
            left += ((one, depth + 1) for one in value)
            left += ((one, depth + 1) for one in value.values())
        elif isinstance(value, list):
            left += ((one, depth + 1) for one in value)
        elif isinstance(value, str):
            if not value.isascii():
                half = next((c for c in value if "\ud800" <= c <= "\udfff"), None)
                if half is not None:
                    raise ValueError(f"{half!r} in it is half a surrogate pair")
        elif finite and isinstance(value, float) and not math.isfinite(value):
            raise ValueError("a number in it is too large for a float")


@contextmanager
def reading(source: object, what: str) -> Iterator[None]:
    """Makes an InputError of whatever reading a file raises.

    For readers that check what they know of: what they don't, a library's own error or a type that
    nobody thought of, is the file's fault as well and no reason for a traceback. A library in Rust
    that panics raises no Exception but a BaseException of its own.

    Args:
        source: the file, for the message.
        what: it should be, with its article: "an adapter".

    Raises:
        InputError: something was raised in the block that is no LoraError.
    """
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror or error}).") from error
    except MemoryError as error:
        raise InputError(
            f"{source}: not {what} that can be used: it asks for more memory than there is."
        ) from error
    except Exception as error:
        if type(error).__module__.startswith("lora."):
            raise  # our own kinds: the device's memory, a failed download
        raise InputError(
            f"{source}: not {what} that can be read; it is damaged ({reason_of(error)})."
        ) from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise InputError(
            f"{source}: not {what} that can be read; it is damaged ({reason_of(error)})."
        ) from None


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust gave up; its class can't be imported."""
    return type(error).__name__ == "PanicException"


def reason_of(error: BaseException) -> str:
    """The first line of an error's text as part of a sentence, short and plain."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = plain(lines[0][:200]).rstrip(".")
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def whole_number(
    values: Mapping[str, Any], key: str, source: object, least: int = 0, most: int = MOST_LARGE
) -> int:
    """A whole number of a file's settings, from `least` to `most`.

    Raises:
        InputError: it is missing or something else.
    """
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(
            f"{source}: {key} is {shown(value)}; it must be a whole number from {least} to "
            f"{most:,}."
        )
    return value


def as_f32(value: Any) -> float | None:
    """A number that an f32 holds, zero or a normal one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    small = number != 0 and abs(number) < F32_LEAST
    return None if small or not abs(number) <= F32_MOST else number


def n_characters(value: Any) -> int:
    """Characters in a value, all told."""
    left, n_characters = [value], 0
    while left:
        one = left.pop()
        if isinstance(one, str):
            n_characters += len(one)
        elif isinstance(one, Mapping):
            left += [*one, *one.values()]
        elif isinstance(one, list | tuple):
            left += one
        else:
            n_characters += 8
    return n_characters
