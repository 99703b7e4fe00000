"""Gradients of several processes added up in a fixed order, in f32 or through f16.

Each process owns a segment of a gradient: it is given everyone's numbers for it, adds them in the
order of the ranks, and hands the sum to all. So every process has the same bytes, two runs have the
same bytes, and no more travels than in a ring: 2·(n − 1)/n of the gradient from each. With several
processes on each of several hosts those of a host do so first, then the owners of one segment
across hosts: a host's network carries each number once, not once a process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

COMM_DTYPES = ("f32", "f16")
_ALIGNED = 64  # numbers: segments are multiples of them
_HEADER = 8  # bytes before the f16 numbers of a row: the f32 that they are divided by
_LARGEST = 2.0**14  # of what is sent as f16, which ends at 65504


class Level(Protocol):
    """Some processes that add up what each has.

    Attributes:
        rank: of this process among them.
        size: how many.
    """

    rank: int
    size: int

    def scatter(self, rows: np.ndarray) -> np.ndarray:
        """Row i, u8 [size, n], goes to rank i; what came: [size, n], row i from rank i."""

    def gather(self, row: np.ndarray) -> np.ndarray:
        """Every rank's row, u8 [n]: [size, n], in the order of their ranks."""


class WholeGather:
    """A level out of nothing but "every process's value, for each of them".

    Args:
        gather: as `Communicator.gather`.
    """

    def __init__(self, rank: int, size: int, gather: Callable[[Any], list[Any]]) -> None:
        self.rank, self.size = rank, size
        self._gather = gather

    def scatter(self, rows: np.ndarray) -> np.ndarray:
        """See `Level`."""
        return np.stack([theirs[self.rank] for theirs in self._gather(rows)])

    def gather(self, row: np.ndarray) -> np.ndarray:
        """See `Level`."""
        return np.stack(self._gather(row))


class Feedback:
    """f16 numbers and what their rounding left, which the next step's are given.

    What is lost in one step is sent in another, so that the sum over steps is that of f32 (Seide et
    al. 2014, "1-bit stochastic gradient descent"; Karimireddy et al. 2019, "Error feedback fixes
    SignSGD").
    """

    def __init__(self) -> None:
        self._left: dict[tuple[Any, ...], np.ndarray] = {}

    def packed(self, key: tuple[Any, ...], rows: np.ndarray) -> np.ndarray:
        """Rows f32 [m, n] as u8 [m, 8 + 2·n].

        Each row is multiplied by a power of two, so that f16 holds its smaller numbers, too.

        Args:
            key: which numbers these are; what was left of them the last time is added.
        """
        left = self._left.get(key)
        wanted = rows if left is None else rows + left
        largest = np.abs(wanted).max(axis=1, initial=0.0)
        usable = np.isfinite(largest) & (largest > 0)
        powers = np.where(usable, np.floor(np.log2(_LARGEST / np.where(usable, largest, 1.0))), 0.0)
        scales = np.exp2(np.clip(powers, -100, 100)).astype(np.float32)[:, None]
        with np.errstate(over="ignore", invalid="ignore"):
            halves = (wanted * scales).astype(np.float16)
            rest = wanted - halves.astype(np.float32) / scales
        rest[~usable] = 0.0  # a step that is not finite is skipped, and leaves nothing
        self._left[key] = rest
        sent = np.empty((len(rows), _HEADER + 2 * rows.shape[1]), np.uint8)
        sent[:, :4] = scales.view(np.uint8)
        sent[:, 4:_HEADER] = 0
        sent[:, _HEADER:] = halves.view(np.uint8)
        return sent

    @staticmethod
    def unpacked(received: np.ndarray) -> np.ndarray:
        """The rows f32 [m, n] of u8 [m, 8 + 2·n]."""
        scales = np.ascontiguousarray(received[:, :4]).view(np.float32)
        halves = np.ascontiguousarray(received[:, _HEADER:]).view(np.float16)
        return halves.astype(np.float32) / scales

    def forget(self) -> None:
        """Drops what is left: a run that resumes here begins without it, too."""
        self._left.clear()


class Reducer:
    """Adds up gradients over levels of processes.

    Args:
        levels: the first is asked first, and what it came to goes through the rest.
        comm_dtype: of COMM_DTYPES, at the last level, which is the slowest.
        threaded: whether a thread of its own does it, so that the device is fed meanwhile.
    """

    def __init__(self, levels: Sequence[Level], comm_dtype: str, *, threaded: bool) -> None:
        if comm_dtype not in COMM_DTYPES:
            raise ValueError(f"a comm_dtype of {comm_dtype!r}")
        self._levels = [level for level in levels if level.size > 1]
        self._last = len(self._levels) - 1
        self._feedback = Feedback() if comm_dtype == "f16" else None
        self._thread = ThreadPoolExecutor(1, "gradients") if threaded else None

    def begin(self, key: int, values: np.ndarray) -> Future[np.ndarray]:
        """Begins to add up f32 [n]; all processes begin the same pieces in the same order.

        Args:
            key: the piece's number, the same in every step.
        """
        if self._thread is not None:
            return self._thread.submit(self._sum, (key,), values, 0)
        done: Future[np.ndarray] = Future()
        done.set_result(self._sum((key,), values, 0))
        return done

    def forget(self) -> None:
        """Drops what error feedback keeps."""
        if self._feedback is not None:
            self._feedback.forget()

    def close(self) -> None:
        """Ends the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _sum(self, key: tuple[Any, ...], values: np.ndarray, depth: int) -> np.ndarray:
        if depth == len(self._levels):
            return values
        level = self._levels[depth]
        n = len(values)
        width = -(-n // (level.size * _ALIGNED)) * _ALIGNED
        rows = np.zeros((level.size, width), np.float32)
        rows.reshape(-1)[:n] = values
        sent = self._encoded(depth, (*key, depth, 0), rows)
        parts = self._decoded(depth, level.scatter(sent))
        own = parts[0].copy()
        for part in parts[1:]:  # in the order of their ranks
            own += part
        own = self._sum((*key, depth), own, depth + 1)
        sent = self._encoded(depth, (*key, depth, 1), own[None])
        whole = self._decoded(depth, level.gather(sent[0]))
        return whole.reshape(-1)[:n]

    def _encoded(self, depth: int, key: tuple[Any, ...], rows: np.ndarray) -> np.ndarray:
        if self._feedback is None or depth != self._last:
            return np.ascontiguousarray(rows).view(np.uint8)
        return self._feedback.packed(key, rows)

    def _decoded(self, depth: int, received: np.ndarray) -> np.ndarray:
        if self._feedback is None or depth != self._last:
            return np.ascontiguousarray(received).view(np.float32)
        return self._feedback.unpacked(received)
