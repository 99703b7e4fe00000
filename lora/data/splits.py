"""Parts of a data set: `train`, `train[:20%]`, `train[10:20]+test`, as `datasets` has it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lora.shaders.errors import InputError

_PART = re.compile(r"\s*([\w.-]+)\s*(?:\[\s*(-?\d+%?)?\s*:\s*(-?\d+%?)?\s*\])?\s*")


@dataclass(frozen=True)
class Part:
    """A stretch of a split.

    Attributes:
        name: of the split.
        start, stop: `10`, `-10` or `20%`; None for the split's own.
    """

    name: str
    start: str | None = None
    stop: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the split."""
        return self.start is None and self.stop is None

    @property
    def needs_count(self) -> bool:
        """Whether it can't be found without knowing how many rows there are."""
        bounds = filter(None, (self.start, self.stop))
        return any(bound.endswith("%") or bound.startswith("-") for bound in bounds)

    def bounds(self, n_rows: int) -> tuple[int, int]:
        """The first row, and that behind the last one, of so many."""
        start, stop = (
            default if bound is None else _place(bound, n_rows)
            for bound, default in ((self.start, 0), (self.stop, n_rows))
        )
        return start, max(start, stop)


def parts_of(split: str) -> list[Part]:
    """What a split's text says.

    Raises:
        InputError: it is none.
    """
    found = []
    for text in split.split("+"):
        match = _PART.fullmatch(text)
        if match is None:
            raise InputError(
                f"split: got {split!r}; write it as train, train[:20%], train[100:200], or several "
                "of these with + between them."
            )
        found.append(Part(*match.groups()))
    return found


def _place(bound: str, n_rows: int) -> int:
    if bound.endswith("%"):
        share = int(bound[:-1])
        share = share + 100 if share < 0 else share
        return min(max(round(share * n_rows / 100), 0), n_rows)
    place = int(bound)
    return min(max(place + n_rows if place < 0 else place, 0), n_rows)
