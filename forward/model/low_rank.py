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


@dataclass(frozen=True)
class Beside:
    """What is trained beside A and B.

    Attributes:
        dora: whether each row of an adapted matrix has a magnitude, behind its group's B.
        tokens: ids whose rows of the embedding are trained themselves. They lie before all groups:
            their gradient is whole last.
    """

    dora: bool = False
    tokens: tuple[int, ...] = ()


NOTHING_BESIDE = Beside()
