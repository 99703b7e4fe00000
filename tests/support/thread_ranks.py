"""Several ranks as threads of one process, in place of what MPI starts."""

from __future__ import annotations

import threading
from typing import Any

from lora.training.communicator import Communicator


class ThreadRanks:
    """Where the threads put down what they tell each other.

    Args:
        size: how many.
        hosts: the name of each one's host.
    """

    def __init__(self, size: int, hosts: list[str] | None = None) -> None:
        self.barrier = threading.Barrier(size, timeout=120)
        self.values: list[Any] = [None] * size
        self.communicators = [_Rank(rank, self, hosts or ["here"] * size) for rank in range(size)]


class _Rank(Communicator):
    def __init__(self, rank: int, ranks: ThreadRanks, hosts: list[str]) -> None:
        self.rank, self.size = rank, len(hosts)
        self._ranks = ranks
        self.__dict__["hosts"] = hosts  # in place of the cached property

    def gather(self, value: Any) -> list[Any]:
        """See `Communicator`."""
        ranks = self._ranks
        ranks.values[self.rank] = value
        ranks.barrier.wait()
        found = list(ranks.values)
        ranks.barrier.wait()
        return found
