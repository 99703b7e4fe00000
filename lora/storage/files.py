"""Files that are whole or absent, whatever ends the process or the machine, and what those leave.

All is written under a temporary name, synced to the disk, then renamed, and the rename is synced,
too. Who wrote a temporary name stands in it: what a process left that is gone is removed at the
next start.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# .NAME.OWNER-RANDOM.tmp is being written; .NAME.OWNER-RANDOM.old makes room for a new NAME.
_TEMPORARY = re.compile(
    r"\.(?P<name>.+)\.((?P<host>[0-9a-f]{4})(?P<process>[0-9a-f]+)-)?[0-9a-f]{8}\.(?P<kind>tmp|old)",
    re.DOTALL,
)


def owner() -> str:
    """This process as temporary names have it: four digits of its host, then its number."""
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:4]
    return f"{host}{os.getpid():x}"


def temporary_path(path: Path, kind: str = "tmp") -> Path:
    """A name beside `path` that nothing has: of this process, and of a `kind` of _TEMPORARY."""
    return path.with_name(f".{path.name}.{owner()}-{uuid.uuid4().hex[:8]}.{kind}")


def is_temporary(name: str) -> bool:
    """Whether a name is one of `temporary_path`, of whatever process."""
    return _TEMPORARY.fullmatch(name) is not None


def write_file(path: Path, contents: bytes | str) -> None:
    """Writes a file so that its name never holds half of the contents."""
    make_directories(path.parent)
    temporary = temporary_path(path)
    data = contents.encode() if isinstance(contents, str) else contents
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields a temporary directory that takes the name `path` when the block ends well.

    Its files are the block's to sync (`write_file` does). A directory that stood there before is
    replaced; one of the two is there at any time, or found by `clean_leftovers`.
    """
    make_directories(path.parent)
    temporary, before = temporary_path(path), None
    temporary.mkdir()
    try:
        yield temporary
        sync_directory(temporary)
        if path.exists():
            before = temporary_path(path, "old")
            os.replace(path, before)
        try:
            os.replace(temporary, path)
        except OSError:
            if before is not None:
                os.replace(before, path)
            raise
        sync_directory(path.parent)
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Removes a directory so that its name never holds half of it."""
    temporary = temporary_path(path)
    os.replace(path, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def make_directories(path: Path) -> None:
    """Makes a directory and those above it; each is on the disk when this returns."""
    if path.is_dir():
        return
    make_directories(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Waits until the names in a directory are on the disk; Windows keeps that by itself."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # a file system that knows no such thing; there is nothing more to do
    finally:
        os.close(descriptor)


def clean_leftovers(directory: Path, *, all_owners: bool = False) -> None:
    """Removes what killed processes left in a directory; puts back what was about to be replaced.

    Args:
        all_owners: whatever process it is from, since this one alone writes there.
    """
    try:
        found = [(path, _TEMPORARY.fullmatch(path.name)) for path in directory.iterdir()]
    except OSError:
        return
    for path, match in found:
        if match is None or not (all_owners or is_gone(match["host"], match["process"])):
            continue
        with suppress(OSError):
            name = directory / match["name"]
            if match["kind"] == "old" and not name.exists():
                os.replace(path, name)
            else:
                remove_whatever(path)


def remove_whatever(path: Path) -> None:
    """Removes a file or a directory, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_gone(host: str | None, process: str | None) -> bool:
    """Whether the process of a temporary name has ended; of another host's that is not known.

    Args:
        host, process: hexadecimal as in `owner`; None in names of earlier versions, whose
            processes are long gone.
    """
    if host is None or process is None:
        return True
    if host != owner()[:4] or sys.platform == "win32":  # there a signal would end it
        return False
    try:
        os.kill(int(process, 16), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
