"""Paths as people write them: ~ and $VAR stand for what a shell would put there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lora.shaders.untrusted import shown

_MOST_NAME_BYTES, _MOST_PATH_BYTES = 255, 4095  # of Linux; others take no more
_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")


def expanded(path: str) -> str:
    """A path with its ~ and $VAR replaced; one that exists as it is written stays.

    Raises:
        ValueError: it can be no path, names a variable that is not set, or a user that there is
            none of.
    """
    check_writable(path)
    if "~" not in path and "$" not in path or _exists(path):
        return path
    whole = os.path.expanduser(os.path.expandvars(path))
    unset = _VARIABLE.search(whole)
    if unset is not None:
        raise ValueError(f"{path!r} names the variable {unset[0]}, which is not set.")
    if whole.startswith("~"):
        raise ValueError(f"{path!r} names a user that this system doesn't have.")
    return whole


def check_writable(path: str) -> None:
    """Refuses what no file system takes for a path.

    Raises:
        ValueError: it holds a null character, or a name that is too long.
    """
    if "\0" in path:
        raise ValueError(f"got {shown(path)}, which holds a null character; no path does.")
    longest = max((len(os.fsencode(name)) for name in re.split(r"[/\\]", path)), default=0)
    if longest > _MOST_NAME_BYTES or len(os.fsencode(path)) > _MOST_PATH_BYTES:
        raise ValueError(
            f"got {shown(path)}, a path of {len(path):,} characters with a name of {longest:,} "
            f"bytes; {_MOST_PATH_BYTES:,} and {_MOST_NAME_BYTES} are the most that files have."
        )


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False
