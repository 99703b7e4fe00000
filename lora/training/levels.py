"""Some processes that add up what each has, and how numbers get from one to another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np


class Level(Protocol):
    """Some processes that add up what each has.

    Attributes:
        rank: of this process among them.
        size: how many.
    """

    rank: int
    size: int

    def scatter(self, sent: np.ndarray, counts: Sequence[int], received: np.ndarray) -> None:
        """Hands everyone its segment.

        Args:
            sent: u8, the segments of all ranks one behind another.
            counts: bytes of each.
            received: u8 [size, counts[rank]], written: row i from rank i.
        """

    def gather(self, own: np.ndarray, counts: Sequence[int], received: np.ndarray) -> None:
        """Hands this rank's segment to everyone.

        Args:
            own: u8 [counts[rank]].
            counts: bytes of each rank's.
            received: u8, written: those of all ranks one behind another.
        """


class WholeGather:
    """A level out of nothing but "every process's value, for each of them".

    Args:
        gather: as `Communicator.gather`.
    """

    def __init__(self, rank: int, size: int, gather: Callable[[Any], list[Any]]) -> None:
        self.rank, self.size = rank, size
        self._gather = gather

    def scatter(self, sent: np.ndarray, counts: Sequence[int], received: np.ndarray) -> None:
        """See `Level`."""
        start = sum(counts[: self.rank])
        for row, theirs in enumerate(self._gather(sent)):
            received[row] = theirs[start : start + counts[self.rank]]

    def gather(self, own: np.ndarray, counts: Sequence[int], received: np.ndarray) -> None:
        """See `Level`."""
        received[:] = np.concatenate(self._gather(own))
