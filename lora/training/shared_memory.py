"""Processes of one host add up gradients in memory that all of them see.

Messages between processes of a host are copied into shared memory and out of it, in small parts and
only while both sides look. Here each writes its gradient where the others read it, adds up a
segment out of everyone's, and all read the sum where it was written: no number is copied twice.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora.training.levels import Key, Level, starts

_log = logging.getLogger(__name__)
_PAGE = 4096
_SHARED_FOLDER = "/dev/shm"
_TOKEN = 32  # bytes by which a file is known again
_SPARE = 64  # bytes a rank that what is packed may be longer than f32 numbers


def shared_file(level: Level, n_bytes: int) -> mmap.mmap | None:
    """Memory that all processes of a level see; None where they can't have it.

    Only Linux lets a process open what another one made without a name (memfd_create(2), and
    proc(5) for its descriptors), so that nothing is left behind by one that is killed, and a
    container's small /dev/shm does not matter; where /proc is closed a file there is taken.
    Processes that only look like one host's, each in a container of its own, do not find the token.
    """
    for folder in (None, _SHARED_FOLDER):
        found = _made(level, _PAGE + n_bytes, folder)
        if found is not None:
            return found
    return None


def _made(level: Level, n_bytes: int, folder: str | None) -> mmap.mmap | None:
    """In a folder, or without a name."""
    own, fd, path, token = None, -1, "", secrets.token_bytes(_TOKEN)
    if level.rank == 0:
        try:
            if folder is None:
                fd = os.memfd_create("webgpu-lora")
                path = f"/proc/{os.getpid()}/fd/{fd}"
            else:
                fd, path = tempfile.mkstemp(prefix="webgpu-lora-", dir=folder)
            os.posix_fallocate(fd, 0, n_bytes)  # else a full host ends in SIGBUS
            own = mmap.mmap(fd, n_bytes)
            own[:_TOKEN] = token
        except (AttributeError, OSError) as error:
            own = None
            _log.debug("no shared memory: %s", error)
    path, token = level.everyone((path, token))[0]
    if level.rank != 0:
        own = _opened(path, n_bytes, token)
    found = all(level.everyone(own is not None))
    if fd >= 0:
        os.close(fd)
        if folder is not None:
            os.unlink(path)
    return own if found else None


def _opened(path: str, n_bytes: int, token: bytes) -> mmap.mmap | None:
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError as error:
        _log.debug("no shared memory: %s", error)
        return None
    try:
        if os.fstat(fd).st_size != n_bytes:
            return None
        found = mmap.mmap(fd, n_bytes)
    except (OSError, ValueError) as error:
        _log.debug("no shared memory: %s", error)
        return None
    finally:
        os.close(fd)
    return found if found[:_TOKEN] == token else None


@dataclass(frozen=True)
class _Region:
    """A key's memory: u8, what each rank has, and the sum."""

    own: tuple[np.ndarray, ...]
    whole: np.ndarray


class SharedLevel:
    """See `Level`: the processes of one host.

    Args:
        messages: the same processes; they take what no memory was reserved for.
    """

    def __init__(self, messages: Level) -> None:
        self.rank, self.size = messages.rank, messages.size
        self._messages = messages
        self._regions: dict[Key, _Region] = {}

    def everyone(self, value: Any) -> list[Any]:
        """See `Level`."""
        return self._messages.everyone(value)

    def barrier(self) -> None:
        """See `Level`."""
        self._messages.barrier()

    def reserve(self, sizes: Sequence[int]) -> None:
        """See `Level`."""
        lengths = [-(-(4 * n + _SPARE * self.size) // _PAGE) * _PAGE for n in sizes]
        memory = shared_file(self._messages, (self.size + 1) * sum(lengths))
        self._regions = {}
        if memory is None:
            return
        flat, at = np.frombuffer(memory, np.uint8), _PAGE
        for number, length in enumerate(lengths):
            parts = flat[at : at + (self.size + 1) * length].reshape(self.size + 1, length)
            self._regions[(number,)] = _Region(tuple(parts[:-1]), parts[-1])
            at += parts.size

    def release(self) -> None:
        """See `Level`."""
        self._regions = {}

    def _region(self, key: Key, n_bytes: int) -> _Region | None:
        region = self._regions.get(key)
        return region if region is not None and n_bytes <= len(region.whole) else None

    def place(self, key: Key, n: int) -> np.ndarray:
        """See `Level`."""
        region = self._region(key, 4 * n)
        if region is None:
            return self._messages.place(key, n)
        return region.own[self.rank][: 4 * n].view(np.float32)

    def scatter(self, key: Key, sent: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
        """See `Level`."""
        region = self._region(key, sum(counts))
        if region is None:
            return self._messages.scatter(key, sent, counts)
        _put(sent, region.own[self.rank])
        self.barrier()
        start = starts(counts)[self.rank]
        return [theirs[start : start + counts[self.rank]] for theirs in region.own]

    def result(self, key: Key, counts: Sequence[int]) -> np.ndarray:
        """See `Level`."""
        region = self._region(key, sum(counts))
        if region is None:
            return self._messages.result(key, counts)
        start = starts(counts)[self.rank]
        return region.whole[start : start + counts[self.rank]]

    def gather(self, key: Key, own: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        """See `Level`."""
        region = self._region(key, sum(counts))
        if region is None:
            return self._messages.gather(key, own, counts)
        _put(own, region.whole[starts(counts)[self.rank] :])
        self.barrier()
        return region.whole[: sum(counts)]


def _put(values: np.ndarray, target: np.ndarray) -> None:
    """Copies values to where target begins, unless they are there."""
    if values.size and values.ctypes.data != target.ctypes.data:
        target[: len(values)] = values
