"""What there is to show of a data set: headings, stretches of text, a histogram."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lora.data.examples import Example, LoadedData, printable

if TYPE_CHECKING:
    from lora.forward.text.tokenizer import Tokenizer

_BINS = 10  # of the histogram


def heading(data: LoadedData, example: Example) -> str:
    """What an example is: where its row stands, its turn, how many tokens, what is cut."""
    text = f"row {example.row} ({printable(data.places[example.row])})"
    if example.turn is not None:
        text += f", message {example.turn} by itself"
    if example.part:
        text += f", part {example.part + 1}"
    n_trained = int(example.trained.sum())
    text += f": {len(example.ids) + example.n_cut} tokens, {n_trained} trained"
    if example.n_cut:
        text += f"; the last {example.n_cut} are cut off"
        text += ", some of them to be trained" if example.cut else ""
    return text


def stretches(example: Example, tokenizer: Tokenizer) -> Iterator[tuple[str, list[int], bool]]:
    """The text of an example in stretches that are trained, or are not: (text, ids, trained)."""
    ids, trained = example.ids.tolist(), example.trained.tolist()
    borders = [0, *(t for t in range(1, len(ids)) if trained[t] != trained[t - 1]), len(ids)]
    before = ""
    for start, end in zip(borders, borders[1:], strict=False):
        # By what the text grows: some tokenizers take the space off a text's first token.
        text = tokenizer.decode(ids[:end], skip_special=False)
        yield text[len(os.path.commonprefix([before, text])) :], ids[start:end], trained[start]
        before = text


def visible(text: str) -> str:
    """A text as a terminal may show it: line breaks are marked, control characters escaped."""
    return "\n".join(printable(line) + "↵" for line in text.split("\n")).removesuffix("↵")


def left_out_rows(data: LoadedData) -> dict[str, list[int]]:
    """The rows that are left out, by the reason."""
    found: dict[str, list[int]] = {}
    for one in data.left_out:
        found.setdefault(one.reason, []).append(one.row)
    return found


def histogram(lengths: Sequence[int] | np.ndarray, max_length: int, width: int) -> list[str]:
    """Lines of a histogram of lengths in tokens, at most `width` characters each."""
    lengths = np.asarray(lengths)
    longest = int(lengths.max())
    size = max(1, -(-(longest + 1) // _BINS))
    counts = np.bincount(lengths // size, minlength=longest // size + 1).tolist()
    digits, wide = len(str(longest + size)), len(str(max(counts)))
    lines = ["tokens before cutting, examples"]
    room = max(1, width - 2 * digits - wide - 20)
    for place, count in enumerate(counts):
        first, last = place * size, place * size + size - 1
        bar = "█" * -(-count * room // max(counts))
        cut = " cut" if first > max_length else " some cut" if last > max_length else ""
        line = f"{first:>{digits}} to {last:>{digits}}  {count:>{wide}} {bar}"
        lines.append(f"{line}{cut if count else ''}".rstrip())
    return lines
