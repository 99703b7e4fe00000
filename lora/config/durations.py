"""Times as people write them."""

from __future__ import annotations

import re

_EPOCHS = re.compile(r"(?P<number>\d+(?:\.\d*)?|\.\d+)?\s*epochs?")
_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def seconds_of(duration: str) -> int:
    """Of 90s, 10m, 1h, or 1h30m.

    Raises:
        ValueError: it is no such time, or none at all.
    """
    match = _DURATION.fullmatch(duration.strip())
    hours, minutes, seconds = (int(n or 0) for n in match.groups()) if match else (0, 0, 0)
    if not (total := 3600 * hours + 60 * minutes + seconds):
        raise ValueError(
            f"got {duration!r}; allowed here: null, a whole number of steps, or a time such as "
            "90s, 10m or 1h."
        )
    return total


def checked_duration(value: str) -> str:
    """The same text, if it is a time.

    Raises:
        ValueError: it is none.
    """
    seconds_of(value)
    return value


def epochs_of(text: str) -> float:
    """Of `epoch`, `2 epochs`, or `0.5 epochs`.

    Raises:
        ValueError: it is no such text, or no time at all.
    """
    match = _EPOCHS.fullmatch(text.strip())
    number = 0.0 if match is None else float(match["number"] or 1)
    if not 0 < number <= 10_000:
        raise ValueError(
            f"got {text!r}; allowed here: null, a whole number of steps, or epochs such as "
            "0.5 epochs."
        )
    return number


def checked_epochs(value: str) -> str:
    """The same text, if it is a number of epochs.

    Raises:
        ValueError: it is none.
    """
    epochs_of(value)
    return value
