"""The other processes of a run, as reading data knows them: rows are tokenized by all together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

from lora.data.sources import Piece
from lora.data.table import TokenizedPiece
from lora.shaders.errors import InputError


class Peers(Protocol):
    """Processes that read the same data; `lora.training.communicator` has more of them."""

    @property
    def rank(self) -> int:
        """Of this process, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def local_rank(self) -> int:
        """Of this process among those of its host, from 0."""

    @property
    def local_size(self) -> int:
        """How many its host has."""

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks, for each of them."""


class Alone:
    """One process."""

    rank, size, local_rank, local_size = 0, 1, 0, 1

    def gather(self, value: Any) -> list[Any]:
        """The value alone."""
        return [value]


def tokenized_together(
    peers: Peers,
    pieces: Iterable[Piece],
    tokenized: Callable[[Sequence[Piece]], Iterable[TokenizedPiece]],
    at_once: int,
) -> Iterator[TokenizedPiece]:
    """The tokens of all pieces in their order, for each process; each tokenizes its share.

    All must take all of it: every `at_once` pieces a process its peers wait for it.

    Args:
        pieces: the same for all.
        tokenized: gives the tokens of some pieces, in their order.
        at_once: pieces that a process takes before it hands on what came of them.

    Raises:
        InputError: a row is wrong; the first of them, for every process.
    """
    coming = iter(pieces)
    while stretch := list(islice(coming, at_once * peers.size)):
        own = list(tokenized(stretch[peers.rank :: peers.size]))
        shares = peers.gather(own)
        for place in range(len(stretch)):
            piece: TokenizedPiece = shares[place % peers.size][place // peers.size]
            if piece.error is not None:
                raise InputError(piece.error)
            yield piece
