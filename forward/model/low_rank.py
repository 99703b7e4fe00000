"""What one matrix is adapted with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LowRank:
    """What one matrix is adapted with.

    Attributes:
        rank: as the user asked for it.
        scale: what its B · A is multiplied by.
    """

    rank: int
    scale: float
