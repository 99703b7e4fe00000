"""What several processes that train one adapter must tell each other."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Communicator(Protocol):
    """The processes of a run: each has micro-batches of its own, all have the same adapter.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
    """

    @property
    def rank(self) -> int:
        """Of this process, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The elementwise sum over all processes, in the order of their ranks, for each of them.

        All call it as often as each other, with arrays of one shape and type.
        """


class SingleProcess:
    """One process alone."""

    rank = 0
    size = 1

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The values themselves."""
        return values
