"""What several processes that train one adapter must tell each other."""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property, reduce
from typing import Any

import numpy as np

from lora.training.levels import Level, WholeGather
from lora.training.reducer import Reducer


class Communicator(ABC):
    """The processes of a run: each has micro-batches of its own, all have the same adapter.

    Who writes another than MPI's (`lora.training.mpi`) needs `gather` alone.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
    """

    rank: int
    size: int

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks, for each of them.

        All call it as often as each other.
        """

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The elementwise sum over all processes, in the order of their ranks, for each of them.

        All call it as often as each other, with arrays of one shape and type.
        """
        total: np.ndarray = reduce(np.add, self.gather(values))
        return total

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, for each; the others' is not looked at."""
        return self.gather(value if self.rank == 0 else None)[0]

    def wait_for(self, value: Any) -> Any:
        """As `broadcast`, where rank 0 may come minutes later than the others."""
        return self.broadcast(value)

    @cached_property
    def hosts(self) -> list[str]:
        """The name of each rank's host."""
        return self.gather(platform.node())

    @property
    def local_rank(self) -> int:
        """Of this process among those of its host, from 0."""
        return self.hosts[: self.rank].count(self.hosts[self.rank])

    @property
    def local_size(self) -> int:
        """How many its host has."""
        return self.hosts.count(self.hosts[self.rank])

    @property
    def overlaps(self) -> bool:
        """Whether `Reducer.begin` may be called from another thread than the rest."""
        return False

    def levels(self) -> Sequence[Level]:
        """How gradients are added up, one level inside the next; see `Reducer`."""
        return [WholeGather(self.rank, self.size, self.gather)]

    def reducer(self, comm_dtype: str) -> Reducer:
        """Adds up gradients.

        Args:
            comm_dtype: what travels, between hosts where there are several: f32, or f16 with error
                feedback.
        """
        return Reducer(self.levels(), comm_dtype, threaded=self.overlaps)


class SingleProcess(Communicator):
    """One process alone."""

    rank = 0
    size = 1

    def gather(self, value: Any) -> list[Any]:
        """The value alone."""
        return [value]

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The values themselves."""
        return values
