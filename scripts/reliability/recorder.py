"""What a run does to its directory, event by event, and what the disk may hold after each.

Before every event (a file opened for writing, a rename, a removal, a new directory, a sync) the
whole directory is looked at. A killed process leaves that. A machine without power leaves less: the
bytes of a file as they were when it was last synced, the names in a directory as they were when
that was. Two ways are tried: nothing but that, and all names of the moment with the synced bytes
behind them (a file system that writes names first).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
Image = tuple[tuple[str, bytes | None], ...]  # paths with contents; None is a directory


@dataclass
class Moment:
    """What the disk may hold at one event.

    Attributes:
        event: that comes next.
        killed, least, names_first: images; see above.
        announced: steps of the newest checkpoint that the run had said to be saved.
    """

    event: str
    killed: Image
    least: Image
    names_first: Image
    announced: int


@dataclass
class Recorder:
    """Looks at a directory while it records.

    Args:
        root: the directory; those above it are taken to be on the disk.

    Attributes:
        moments: one for each event.
        announced: set by who listens to the run.
    """

    root: Path
    moments: list[Moment] = field(default_factory=list)
    announced: int = 0
    _busy: bool = True
    _names: dict[int, int] = field(default_factory=dict)  # inode to a number of its own
    _count: int = 0
    _synced_bytes: dict[int, bytes] = field(default_factory=dict)
    _synced_names: dict[int, dict[str, int]] = field(default_factory=dict)
    _kinds: dict[int, bool] = field(default_factory=dict)  # whether it is a directory

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records what happens in the block; an audit hook stays, without effect."""
        sys.addaudithook(self._audit)
        sync = os.fsync

        def noted(descriptor: int) -> None:
            self._look("sync")
            sync(descriptor)
            self._synced(descriptor)

        os.fsync = noted  # type: ignore[assignment]
        self._busy = False
        try:
            yield
            self._look("end")
        finally:
            self._busy = True
            os.fsync = sync

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._busy:
            return
        if event == "open":
            path, _, flags = arguments
            inside = isinstance(path, (str, os.PathLike)) and str(path).startswith(str(self.root))
            if not inside or not (flags or 0) & _WRITES:
                return
        elif event not in _CHANGES:
            return
        self._look(event)

    def _look(self, event: str) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            names, contents = self._scan()
            killed = _image(self._root_id(), names, contents, self._kinds)
            synced = {i: self._synced_bytes.get(i, b"") for i in contents}
            first = _image(self._root_id(), names, synced, self._kinds)
            least = _image(self._root_id(), self._synced_names, self._synced_bytes, self._kinds)
            self.moments.append(Moment(event, killed, least, first, self.announced))
        finally:
            self._busy = False

    def _root_id(self) -> int:
        return self._id(os.stat(self.root).st_ino) if self.root.exists() else -1

    def _id(self, inode: int) -> int:
        """A number that no other file ever has, though inodes are used again."""
        if inode not in self._names:
            self._count += 1
            self._names[inode] = self._count
        return self._names[inode]

    def _scan(self) -> tuple[dict[int, dict[str, int]], dict[int, bytes]]:
        names: dict[int, dict[str, int]] = {}
        contents: dict[int, bytes] = {}
        seen = set()
        for folder, directories, files in os.walk(self.root):
            stat = os.stat(folder)
            seen.add(stat.st_ino)
            here = names.setdefault(self._id(stat.st_ino), {})
            self._kinds[self._id(stat.st_ino)] = True
            for name in (*directories, *files):
                path = os.path.join(folder, name)
                inode = os.stat(path).st_ino
                seen.add(inode)
                here[name] = self._id(inode)
                self._kinds[self._id(inode)] = name in directories
                if name in files:
                    contents[self._id(inode)] = Path(path).read_bytes()
        for inode in set(self._names) - seen:
            del self._names[inode]
        return names, contents

    def _synced(self, descriptor: int) -> None:
        """Notes what is on the disk from now on."""
        self._busy = True
        try:
            names, contents = self._scan()
            number = self._names.get(os.fstat(descriptor).st_ino)
            if number is None:
                return  # outside
            if number in names:
                self._synced_names[number] = dict(names[number])
            else:
                self._synced_bytes[number] = contents[number]
        finally:
            self._busy = False


def _image(
    root: int, names: dict[int, dict[str, int]], contents: dict[int, bytes], kinds: dict[int, bool]
) -> Image:
    """The files below a directory, by their paths."""
    found: list[tuple[str, bytes | None]] = []

    def walk(number: int, prefix: str) -> None:
        for name, inner in sorted(names.get(number, {}).items()):
            if kinds.get(inner):
                found.append((prefix + name, None))
                walk(inner, f"{prefix}{name}/")
            else:
                found.append((prefix + name, contents.get(inner, b"")))

    walk(root, "")
    return tuple(found)


def lay_out(image: Image, root: Path) -> None:
    """Makes a directory hold an image."""
    root.mkdir(parents=True)
    for name, contents in image:
        if contents is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(contents)
