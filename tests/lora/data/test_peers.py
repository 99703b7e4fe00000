"""Rows tokenized by several processes, and a step's micro-batches dealt among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lora.data.order import Share
from lora.data.peers import Peers, tokenized_together
from lora.data.sources import Piece
from lora.data.table import TokenizedPiece
from lora.shaders.errors import InputError
from tests.support.thread_ranks import ThreadRanks


def pieces(n: int) -> list[Piece]:
    return [Piece([{"text": str(i)}], [i], "row") for i in range(n)]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 1, 5, 12, 13])
def test_each_tokenizes_its_share_and_has_all(size: int, n: int) -> None:
    done: list[list[int]] = [[] for _ in range(size)]

    def read(peers: Peers) -> list[int]:
        def tokenized(some: Sequence[Piece]) -> Iterable[TokenizedPiece]:
            for piece in some:
                done[peers.rank].append(piece.numbers[0])
                yield TokenizedPiece({"ids": np.array(piece.numbers)}, "row", ())

        found = tokenized_together(peers, pieces(n), tokenized, 2)
        return [int(piece.arrays["ids"][0]) for piece in found]

    with ThreadPoolExecutor(size) as pool:
        everyone = list(pool.map(read, ThreadRanks(size).communicators))
    assert everyone == [list(range(n))] * size
    assert sorted(number for own in done for number in own) == list(range(n))
    assert max(map(len, done)) - min(map(len, done)) <= 2


def test_the_first_wrong_row_is_everyones_error() -> None:
    def read(peers: Peers) -> str:
        def tokenized(some: Sequence[Piece]) -> Iterable[TokenizedPiece]:
            for piece in some:
                wrong = piece.numbers[0] >= 3
                error = f"row {piece.numbers[0]} is wrong" if wrong else None
                yield TokenizedPiece({}, "row", (), error)

        with pytest.raises(InputError) as refused:
            list(tokenized_together(peers, pieces(9), tokenized, 2))
        return str(refused.value)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(read, ThreadRanks(2).communicators)) == ["row 3 is wrong"] * 2


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 16])
def test_every_micro_batch_is_dealt_once(size: int, n: int) -> None:
    sizes = np.random.default_rng(n).integers(1, 1000, n).tolist()
    shares = [Share(rank, size).of(sizes) for rank in range(size)]
    assert sorted(place for share in shares for place in share) == list(range(n))
    assert max(map(len, shares)) <= -(-n // size)
    assert all(share == sorted(share) for share in shares)


def test_they_are_dealt_by_their_tokens() -> None:
    """Not in turn, which would give one 1,010 tokens and the other 20."""
    sizes = [1000, 10, 10, 10]
    assert [Share(rank, 2).of(sizes) for rank in range(2)] == [[0, 3], [1, 2]]
    assert [Share(rank, 2).of([5, 900, 6, 800]) for rank in range(2)] == [[0, 1], [2, 3]]
