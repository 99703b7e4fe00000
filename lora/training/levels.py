"""Some processes that add up what each has, and how numbers get from one to another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

Key = tuple[int, ...]  # which numbers these are: a piece of the gradient, at which level


class Kept:
    """Memory that stays with a key: pages of new memory cost more than what is copied into them."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], np.ndarray] = {}

    def __call__(self, key: tuple[Any, ...], n: int, kind: Any = np.float32) -> np.ndarray:
        """[n] of a key; another where its size has changed."""
        found = self._buffers.get(key)
        if found is None or len(found) != n:
            found = self._buffers[key] = np.empty(n, kind)
        return found


class Level(Protocol):
    """Some processes that add up what each has.

    All call everything as often as each other, in the same order. What is handed out under a key
    stays as it is until that key's `scatter` begins again.

    Attributes:
        rank: of this process among them.
        size: how many.
    """

    rank: int
    size: int

    def everyone(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks, for each of them."""

    def barrier(self) -> None:
        """Returns when all have called it."""

    def reserve(self, sizes: Sequence[int]) -> None:
        """Readies memory for keys (0,), (1,) …

        Args:
            sizes: f32 numbers of each.
        """

    def release(self) -> None:
        """Gives back what `reserve` readied; of this process alone, behind its last sum."""

    def place(self, key: Key, n: int) -> np.ndarray:
        """Where f32 [n] of this process are best put before `scatter`."""

    def scatter(self, key: Key, sent: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
        """Hands everyone its segment.

        Args:
            sent: u8, the segments of all ranks one behind another.
            counts: bytes of each.

        Returns:
            u8 [counts[rank]] of every rank, in their order, to be read.
        """

    def result(self, key: Key, counts: Sequence[int]) -> np.ndarray:
        """Where u8 [counts[rank]] of this process are best put before `gather`."""

    def gather(self, key: Key, own: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        """Hands this rank's segment to everyone.

        Args:
            own: u8 [counts[rank]].
            counts: bytes of each rank's.

        Returns:
            u8, those of all ranks one behind another, to be read.
        """


class WholeGather:
    """A level out of nothing but "every process's value, for each of them".

    Args:
        gather: as `Communicator.gather`.
    """

    def __init__(self, rank: int, size: int, gather: Callable[[Any], list[Any]]) -> None:
        self.rank, self.size = rank, size
        self._gather = gather
        self._kept = Kept()

    def everyone(self, value: Any) -> list[Any]:
        """See `Level`."""
        return self._gather(value)

    def barrier(self) -> None:
        """See `Level`."""
        self._gather(None)

    def reserve(self, sizes: Sequence[int]) -> None:
        """See `Level`."""

    def release(self) -> None:
        """See `Level`."""

    def place(self, key: Key, n: int) -> np.ndarray:
        """See `Level`."""
        return self._kept((*key, "place"), n)

    def scatter(self, key: Key, sent: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
        """See `Level`."""
        start = sum(counts[: self.rank])
        return [theirs[start : start + counts[self.rank]] for theirs in self._gather(sent.copy())]

    def result(self, key: Key, counts: Sequence[int]) -> np.ndarray:
        """See `Level`."""
        return self._kept((*key, "result"), counts[self.rank], np.uint8)

    def gather(self, key: Key, own: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        """See `Level`."""
        return np.concatenate(self._gather(own.copy()))


def starts(counts: Sequence[int]) -> list[int]:
    """Where each of some segments begins."""
    return [0, *accumulate(counts[:-1])]
