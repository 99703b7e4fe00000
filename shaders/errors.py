"""The errors of this project: sentences that say what is wrong, where, and how to mend it."""

from __future__ import annotations

_MOST_CHARACTERS = 6000  # of a message: more is no sentence, and a file may hold gigabytes of text


def plain(text: str) -> str:
    """A text without what a terminal would obey: all but printable characters are escaped.

    Line breaks stay: a message may have several lines.
    """
    if text.isprintable():
        return text
    return "".join(
        c
        if c == "\n" or c.isprintable()
        else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in text
    )


def for_terminal(text: str) -> str:
    """A text of a model or a data set for a terminal: control characters but \\n and \\t escaped.

    Unlike `plain` it leaves what text of all languages is made of, joiners of emoji included.
    """
    if text.isprintable():
        return text
    return "".join(
        c
        if c in "\n\t" or not (c < " " or "\x7f" <= c <= "\x9f")
        else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


class LoraError(Exception):
    """Something failed while running. The message is one or two sentences for the user.

    Messages quote files and names that nobody vouches for, so that every one is shortened and made
    `plain` here, wherever it is shown later.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message)
        if len(text) > _MOST_CHARACTERS:
            text = f"{text[: _MOST_CHARACTERS - 200]} … {text[-190:]}"
        super().__init__(plain(text))


class InputError(LoraError):
    """What the user gave is wrong: a config, a file, a device name. Exit status 2."""


class DeviceMemoryError(LoraError):
    """The device has no room for a buffer. Who knows what the memory is for says more."""


def is_lost(error: BaseException) -> bool:
    """Whether an error says that the device is gone; both implementations have the word."""
    return isinstance(error, GPUError) and "lost" in str(error).lower()


class GPUError(Exception):
    """What a WebGPU implementation refused: code, a command, memory. Our fault, or a driver's."""
