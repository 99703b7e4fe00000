"""Names that may have been meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST_LISTED = 8


def nearest_first(wanted: str, names: Iterable[str]) -> str:
    """Some names as a list in words, those that are most like the wanted one first."""
    ordered = sorted(names)
    ordered.sort(key=lambda n: -difflib.SequenceMatcher(None, wanted, n, autojunk=False).ratio())
    more = len(ordered) - _MOST_LISTED
    return ", ".join(ordered[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
