"""Bytes of an open file, read when they are asked for.

Not through a memory map: the bytes of a mapped file that another program cuts meanwhile are no
error but a SIGBUS, which ends the process without a word.
"""

from __future__ import annotations

import os
import stat
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from lora.shaders.errors import InputError

_MOST_AT_ONCE = 1 << 30  # bytes: Linux reads 2 GiB at most


class OpenFile:
    """A regular file that stays open, so that it stays the same one under whatever name.

    Attributes:
        path: where it was.
        size: bytes that it had when it was opened.
    """

    def __init__(self, path: Path) -> None:
        """Opens it.

        Raises:
            InputError: there is no such file, it can't be read, is empty, or no regular file.
        """
        self.path = path
        try:
            # Asked before it is opened: opening a pipe waits for who writes to it.
            status = path.stat()
            if stat.S_ISDIR(status.st_mode):
                raise InputError(f"{path} is a directory; a GGUF file is expected.")
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{path} is not a regular file; a GGUF file is expected.")
            flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
            self._descriptor = os.open(path, flags)
        except (FileNotFoundError, NotADirectoryError) as error:
            if path.is_symlink():
                raise InputError(f"{path} is a link to a file that is not there.") from error
            raise InputError(f"There is no file {path}.") from error
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.") from error
        except ValueError as error:  # a null character
            raise InputError(f"{str(path)!r} is no path of a file.") from error
        weakref.finalize(self, os.close, self._descriptor)
        self._lock = threading.Lock()  # where seeking and reading are two calls
        self.size = os.fstat(self._descriptor).st_size
        if self.size == 0:
            raise InputError(f"{path} is empty; a GGUF file is expected.")

    def read(self, start: int, stop: int) -> np.ndarray:
        """The bytes from `start` to `stop`, both within `size`.  # uint8 [stop - start]

        Raises:
            InputError: the file has been cut since it was opened, or can't be read any more.
        """
        content = np.empty(stop - start, np.uint8)
        left, position = content.data, start
        while len(left):
            try:
                n_read = self._read_into(left[:_MOST_AT_ONCE], position)
            except OSError as error:
                raise InputError(f"{self.path} cannot be read: {error.strerror}.") from error
            if n_read == 0:
                raise InputError(
                    f"{self.path} was cut while it was being read: it had {self.size:,} bytes, and "
                    f"now it ends before byte {stop:,}. Fetch the file again."
                )
            left, position = left[n_read:], position + n_read
        return content

    def _read_into(self, target: memoryview, position: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [target], position)
        with self._lock:  # Windows and some others
            os.lseek(self._descriptor, position, os.SEEK_SET)
            content = os.read(self._descriptor, len(target))
        target[: len(content)] = content
        return len(content)


class FileRows:
    """Rows of bytes in an open file; slices and `np.asarray` read them.

    Attributes:
        shape: (rows, bytes a row).
    """

    def __init__(self, file: OpenFile, start: int, rows: int, row_bytes: int) -> None:
        self._file = file
        self._start = start
        self.shape = rows, row_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.shape[0] * self.shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:  # uint8 [rows, bytes a row]
        """Reads some rows that lie one after another.

        Raises:
            InputError: as of `OpenFile.read`.
        """
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError("rows of a file are read one after another")
        first, width = self._start, self.shape[1]
        content = self._file.read(first + start * width, first + max(start, stop) * width)
        return content.reshape(-1, width)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self[:]
        return whole if dtype is None else whole.astype(dtype)
