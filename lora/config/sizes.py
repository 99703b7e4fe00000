"""Sizes of memory as people write them: 7GiB, 7.5 GB."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size_of(text: str | int) -> int:
    """Bytes of "7GiB", "7.5 GB", "800 MiB", or a number of bytes.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        number, unit = float(text), ""
    else:
        found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]?)(i?)B?\s*", str(text), re.I)
        if found is None or (found[3] and not found[2]):
            raise ValueError("expected a size as 7GiB or 7.5GB")
        number, unit = float(found[1]), found[2].upper()
        if found[3]:
            return _positive(int(number * _BINARY[unit]))
    return _positive(int(number * _UNITS[unit]))


def _positive(n_bytes: int) -> int:
    if n_bytes < 1:
        raise ValueError("expected a size above 0")
    return n_bytes


def checked_size(text: str) -> str:
    """The text, if it is auto or a size.

    Raises:
        ValueError: it is neither; in the words of the config's messages.
    """
    if text != "auto":
        try:
            size_of(text)
        except ValueError:
            allowed = "allowed here: auto, or a size such as 7GiB."
            raise ValueError(f"got {text[:40]!r}; {allowed}") from None
    return text
