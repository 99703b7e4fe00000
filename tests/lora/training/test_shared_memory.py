"""Memory that processes of a host share: the same sums as by messages, and who can't have it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.training import shared_memory
from lora.training.levels import WholeGather
from lora.training.reducer import Reducer
from lora.training.shared_memory import SharedLevel, shared_file
from tests.support.thread_ranks import ThreadRanks

SIZES = (1000, 64, 3)  # the last leaves a rank nothing

needs_memfd = pytest.mark.skipif(
    not hasattr(os, "memfd_create"), reason="only Linux has memory without a name"
)


def everywhere(size: int, work: Callable[[WholeGather], Any]) -> list[Any]:
    """What each of some threads, as ranks, makes of its messages."""
    ranks = ThreadRanks(size).communicators
    levels = [WholeGather(one.rank, one.size, one.gather) for one in ranks]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, levels))


def sums(
    level: WholeGather, *, shared: bool, comm_dtype: str = "f32", steps: int = 3
) -> list[bytes]:
    """Of some steps' gradients, put where the reducer says."""
    reducer = Reducer([SharedLevel(level) if shared else level], comm_dtype, threaded=True)
    reducer.reserve(SIZES)
    rng, found = np.random.default_rng(level.rank), []
    for _ in range(steps):
        pieces = []
        for number, n in enumerate(SIZES):
            values = reducer.place(number, n)
            values[:] = rng.normal(size=n)
            pieces.append(reducer.begin(number, values))
        found += [piece.result().tobytes() for piece in pieces]
        level.barrier()  # as a step ends with a gathering
    reducer.close()
    assert reducer.place(0, SIZES[0]).base is None  # of nobody else any more
    return found


@needs_memfd
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("comm_dtype", ["f32", "f16"])
def test_sums_are_those_of_messages(size: int, comm_dtype: str) -> None:
    """To the last bit, over several steps in the same memory."""
    wanted = everywhere(size, lambda level: sums(level, shared=False, comm_dtype=comm_dtype))
    found = everywhere(size, lambda level: sums(level, shared=True, comm_dtype=comm_dtype))
    assert found == wanted
    assert all(one == found[0] for one in found)


@needs_memfd
def test_a_piece_is_where_the_others_read_it() -> None:
    """Else each number would be copied twice."""

    def work(level: WholeGather) -> bool:
        shared = SharedLevel(level)
        shared.reserve(SIZES)
        values = shared.place((0,), SIZES[0])
        values[:] = level.rank
        counts = [4 * 512, 4 * (SIZES[0] - 512)]
        parts = shared.scatter((0,), values.view(np.uint8), counts)
        mine = np.shares_memory(parts[level.rank], values)
        return mine and [part.view(np.float32)[0] for part in parts] == [0.0, 1.0]

    assert everywhere(2, work) == [True, True]


def test_what_nothing_was_reserved_for_goes_by_messages() -> None:
    def work(level: WholeGather) -> bytes:
        reducer = Reducer([SharedLevel(level)], "f32", threaded=False)
        return reducer.begin(7, np.full(100, level.rank + 1, np.float32)).result().tobytes()

    assert everywhere(2, work) == [np.full(100, 3, np.float32).tobytes()] * 2


def _no_room(*_: Any) -> int:
    raise OSError(28, "No space left on device")


def test_a_host_without_room_adds_up_by_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = everywhere(2, lambda level: sums(level, shared=False))
    monkeypatch.setattr(os, "posix_fallocate", _no_room, raising=False)
    assert everywhere(2, lambda level: shared_file(level, 100)) == [None, None]
    assert everywhere(2, lambda level: sums(level, shared=True)) == wanted


@needs_memfd
def test_a_process_that_cannot_open_it_keeps_all_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in another container of the same name: that descriptor is nothing, or something else."""
    opened = shared_memory._opened
    with open(os.devnull, "rb") as other:
        for path in ("/proc/0/fd/0", f"/proc/self/fd/{other.fileno()}"):
            monkeypatch.setattr(
                shared_memory, "_opened", lambda _, *rest, path=path: opened(path, *rest)
            )
            assert everywhere(2, lambda level: shared_file(level, 100)) == [None, None]


@needs_memfd
def test_where_proc_is_closed_a_file_is_taken_that_nobody_sees_afterwards(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened = shared_memory._opened

    def closed(path: str, n_bytes: int, token: bytes) -> mmap.mmap | None:
        return None if path.startswith("/proc") else opened(path, n_bytes, token)

    monkeypatch.setattr(shared_memory, "_opened", closed)
    monkeypatch.setattr(shared_memory, "_SHARED_FOLDER", str(tmp_path))
    found = everywhere(2, lambda level: shared_file(level, 100))
    found[0][4100] = 7
    assert found[1][4100] == 7
    assert not list(tmp_path.iterdir())


@needs_memfd
def test_a_file_without_the_token_is_not_taken() -> None:
    fd = os.memfd_create("other")
    os.ftruncate(fd, 5000)
    assert shared_memory._opened(f"/proc/self/fd/{fd}", 5000, b"x" * 32) is None
    assert shared_memory._opened(f"/proc/self/fd/{fd}", 5000, bytes(32)) is not None
    assert shared_memory._opened(f"/proc/self/fd/{fd}", 4000, bytes(32)) is None
    os.close(fd)
