"""Gradients of several processes added up in a fixed order, in f32 or through f16.

Each process owns a segment of a gradient: it is given everyone's numbers for it, adds them in the
order of the ranks, and hands the sum to all. So every process has the same bytes, two runs have the
same bytes, and no more travels than in a ring: 2·(n − 1)/n of the gradient from each. With several
processes on each of several hosts those of a host do so first, then the owners of one segment
across hosts: a host's network carries each number once, not once a process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import numpy as np

from lora.training.levels import Kept, Key, Level

COMM_DTYPES = ("f32", "f16")
_ALIGNED = 64  # numbers: segments begin at multiples of them
_HEADER = 8  # bytes before the f16 numbers of a segment: the f32 that they are multiplied by
_LARGEST = 2.0**14  # of what is sent as f16, which ends at 65504
_CHUNK = 1 << 18  # numbers that a thread converts at once: a megabyte, which caches hold
_MOST_THREADS = 8


class Feedback:
    """f16 numbers and what their rounding left, which the next step's are given.

    What is lost in one step is sent in another, so that the sum over steps is that of f32 (Seide et
    al. 2014, "1-bit stochastic gradient descent"; Karimireddy et al. 2019, "Error feedback fixes
    SignSGD").
    """

    def __init__(self) -> None:
        self._left: dict[Any, np.ndarray] = {}
        # numpy converts about a gigabyte a second on one thread, slower than many networks.
        self._pool = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "halves")

    @staticmethod
    def size(n: int) -> int:
        """Bytes of n numbers."""
        return _HEADER + 2 * n

    def pack(self, key: Any, values: np.ndarray, packed: np.ndarray) -> None:
        """Writes f32 [n] as u8 [size(n)].

        They are multiplied by a power of two, so that f16 holds the smaller ones, too.

        Args:
            key: which numbers these are; what was left of them the last time is added.
        """
        left = self._left.setdefault(key, np.zeros(len(values), np.float32))
        left += values
        largest = max(float(left.max(initial=0.0)), -float(left.min(initial=0.0)))
        usable = 0.0 < largest < np.inf  # False for NaN, too
        power = np.floor(np.log2(_LARGEST / largest)) if usable else 0.0
        scale = np.float32(np.exp2(np.clip(power, -100, 100)))
        packed[:_HEADER].view(np.float32)[:] = scale, 0.0
        halves = packed[_HEADER:].view(np.float16)

        def convert(part: slice) -> None:
            with np.errstate(over="ignore", invalid="ignore"):
                halves[part] = left[part] * scale
                left[part] -= halves[part].astype(np.float32) / scale

        self._in_chunks(len(values), convert)
        if not usable:
            left[:] = 0.0  # a step that is not finite is skipped, and leaves nothing

    def unpack(self, packed: np.ndarray, values: np.ndarray) -> None:
        """Writes the f32 [n] of u8 [size(n)]."""
        scale = packed[:4].view(np.float32)[0]
        halves = packed[_HEADER:].view(np.float16)

        def convert(part: slice) -> None:
            np.divide(halves[part].astype(np.float32), scale, out=values[part])

        self._in_chunks(len(values), convert)

    def _in_chunks(self, n: int, work: Callable[[slice], None]) -> None:
        parts = [slice(start, min(start + _CHUNK, n)) for start in range(0, n, _CHUNK)]
        if len(parts) > 1:
            list(self._pool.map(work, parts))
        elif parts:
            work(parts[0])

    def forget(self) -> None:
        """Drops what is left: a run that resumes here begins without it, too."""
        self._left.clear()

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=False)


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
        self._kept = Kept()

    def reserve(self, sizes: Sequence[int]) -> None:
        """Readies memory; all processes call it before they begin.

        Args:
            sizes: of the pieces 0, 1 …, in numbers.
        """
        if self._levels:
            self._levels[0].reserve(sizes)

    def place(self, key: int, n: int) -> np.ndarray:
        """Where a piece of f32 [n] is best put before `begin`, which then copies nothing."""
        return self._levels[0].place((key,), n) if self._levels else self._kept((key,), n)

    def begin(self, key: int, values: np.ndarray) -> Future[np.ndarray]:
        """Begins to add up f32 [n]; all processes begin the same pieces in the same order.

        Args:
            key: the piece's number, the same in every step. The sum is kept until it begins again.
        """
        if self._thread is not None:
            return self._thread.submit(self._sum, (key,), values)
        done: Future[np.ndarray] = Future()
        done.set_result(self._sum((key,), values))
        return done

    def forget(self) -> None:
        """Drops what error feedback keeps."""
        if self._feedback is not None:
            self._feedback.forget()

    def close(self) -> None:
        """Ends the threads, and gives memory back."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        for level in self._levels:
            level.release()
        if self._feedback is not None:
            self._feedback.close()

    def _sum(self, key: Key, values: np.ndarray) -> np.ndarray:
        """Over the levels from len(key) - 1 on."""
        depth = len(key) - 1
        if depth == len(self._levels):
            return values
        level, n = self._levels[depth], len(values)
        width = -(-n // (level.size * _ALIGNED)) * _ALIGNED
        bounds = [min(rank * width, n) for rank in range(level.size + 1)]
        lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
        if self._feedback is not None and depth == self._last:
            return self._sum_of_halves(self._feedback, key, values, lengths)
        counts = [4 * length for length in lengths]
        parts = level.scatter(key, values.view(np.uint8), counts)
        own = level.result(key, counts).view(np.float32)
        add_up([part.view(np.float32) for part in parts], own)
        own = self._sum((*key, 0), own)
        return level.gather(key, own.view(np.uint8), counts).view(np.float32)

    def _sum_of_halves(
        self, feedback: Feedback, key: Key, values: np.ndarray, lengths: Sequence[int]
    ) -> np.ndarray:
        """The same, where what travels is f16; the last level."""
        level = self._levels[len(key) - 1]
        counts = [feedback.size(length) for length in lengths]
        sent = self._kept((*key, "sent"), sum(counts), np.uint8)
        ends, packed_ends = list(accumulate(lengths)), list(accumulate(counts))
        for rank, (end, packed_end) in enumerate(zip(ends, packed_ends, strict=True)):
            row = values[end - lengths[rank] : end]
            feedback.pack((*key, rank), row, sent[packed_end - counts[rank] : packed_end])
        mine = lengths[level.rank]
        parts = list(self._kept((*key, "parts"), level.size * mine).reshape(level.size, mine))
        for theirs, part in zip(level.scatter(key, sent, counts), parts, strict=True):
            feedback.unpack(theirs, part)
        own = self._kept((*key, "own"), mine)
        add_up(parts, own)
        packed = self._kept((*key, "packed"), counts[level.rank], np.uint8)
        feedback.pack((*key, "own"), own, packed)
        received = level.gather(key, packed, counts)
        whole = self._kept((*key, "whole"), len(values))
        for rank, (end, packed_end) in enumerate(zip(ends, packed_ends, strict=True)):
            part = whole[end - lengths[rank] : end]
            feedback.unpack(received[packed_end - counts[rank] : packed_end], part)
        return whole


def add_up(parts: Sequence[np.ndarray], total: np.ndarray) -> None:
    """Writes the sum of f32 [n] each, in their order, in stretches that caches hold.

    Some may be infinite or NaN: what comes of such a step is decided on the device.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(total), _CHUNK):
            stretch = slice(start, start + _CHUNK)
            np.add(parts[0][stretch], parts[1][stretch], out=total[stretch])
            for part in parts[2:]:
                np.add(total[stretch], part[stretch], out=total[stretch])
