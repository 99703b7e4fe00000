"""What compressed files hold, with a bound for each row.

A compressed file of a few kilobytes can be one row of gigabytes, which would fill the memory before
anything is found wrong with it.
"""

from __future__ import annotations

import io
from typing import Any

from lora.shaders.errors import InputError

_BLOCK = 1 << 20  # bytes that readers ask for ahead of a row


class Unpacked(io.RawIOBase):
    """A decompressed stream, refused where one row takes too many bytes of it.

    Args:
        stream: has `read` and `close`.
        name: of the file, for the message.
        most: bytes that a row may take.

    Attributes:
        taken: bytes since the last row.
    """

    def __init__(self, stream: Any, name: str, most: int) -> None:
        self._stream, self._name, self._most = stream, name, most
        self.taken = 0

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`.

        Raises:
            InputError: the row has become too long.
        """
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        self.taken += len(content)
        if self.taken > self._most + _BLOCK:
            raise InputError(
                f"{self._name}: unpacked, one row of it is longer than {self._most >> 20} MiB, "
                "which none is; the file is damaged, or not what its ending says."
            )
        return len(content)

    def close(self) -> None:
        """See `io.RawIOBase`."""
        self._stream.close()
        super().close()


def row_given(file: Any) -> None:
    """Lets a compressed file go on, since a row has come out of it; others need no leave."""
    raw = getattr(getattr(file, "buffer", file), "raw", None)
    if isinstance(raw, Unpacked):
        raw.taken = 0
