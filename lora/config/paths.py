"""Paths as people write them: ~ and $VAR stand for what a shell would put there."""

from __future__ import annotations

import os
import re
from pathlib import Path

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")


def expanded(path: str) -> str:
    """A path with its ~ and $VAR replaced; one that exists as it is written stays.

    Raises:
        ValueError: it names a variable that is not set, or a user that there is none of.
    """
    if "~" not in path and "$" not in path or _exists(path):
        return path
    whole = os.path.expanduser(os.path.expandvars(path))
    unset = _VARIABLE.search(whole)
    if unset is not None:
        raise ValueError(f"{path!r} names the variable {unset[0]}, which is not set.")
    if whole.startswith("~"):
        raise ValueError(f"{path!r} names a user that this system doesn't have.")
    return whole


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False
