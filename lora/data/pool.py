"""Processes that tokenize pieces side by side, and give them back in order.

They are started as commands, not forked: a script that opens a session needs no
`if __name__ == "__main__"`, and a device that is open already is nothing that a fork would survive.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING

from lora.data.sources import Piece
from lora.data.table import TokenizedPiece
from lora.shaders.errors import InputError, LoraError

if TYPE_CHECKING:
    from lora.data.worker import Setup

_MOST_PROCESSES = 8
_AHEAD = 2  # pieces a process that wait to be tokenized, or to be taken


def n_processes() -> int:
    """How many a pool has: one a processor that this one may run on, up to 8."""
    available = getattr(os, "sched_getaffinity", None)
    n = len(available(0)) if available is not None else os.cpu_count() or 1
    return min(n, _MOST_PROCESSES)


def can_start() -> bool:
    """Whether there is a Python to start; within another program there may be none."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)


class Pool:
    """Some processes; a context manager, which ends them.

    Args:
        setup: what they are told first.
        size: how many; None for `n_processes`.
    """

    def __init__(self, setup: Setup, size: int | None = None) -> None:
        self._setup = pickle.dumps(setup)
        self._size = size or n_processes()
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Pool:
        # One thread each: the library's own would wait for the other processes'.
        environment = {
            **os.environ,
            "TOKENIZERS_PARALLELISM": "false",
            "RAYON_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        for _ in range(self._size):
            process = subprocess.Popen(
                [sys.executable, "-m", "lora.data.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C is this process's, which then ends them
            )
            self._processes.append(process)
            self._idle.put(process)
        for process in self._processes:
            self._send(process, self._setup)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self._processes:
            if error is not None:
                process.kill()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(OSError):  # of a process that has ended, with something left to write
                    pipe.close()
            process.wait()

    def tokenized(self, pieces: Iterable[Piece]) -> Iterator[TokenizedPiece]:
        """The pieces' tokens, in the pieces' order.

        Raises:
            LoraError: a process has ended.
        """
        pending: deque[Future[TokenizedPiece]] = deque()
        with ThreadPoolExecutor(self._size) as threads:
            try:
                for piece in pieces:
                    pending.append(threads.submit(self._ask, piece))
                    if len(pending) > _AHEAD * self._size:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            except BaseException:
                for future in pending:
                    future.cancel()
                raise

    def _ask(self, piece: Piece) -> TokenizedPiece:
        process = self._idle.get()
        try:
            self._send(process, pickle.dumps(piece, pickle.HIGHEST_PROTOCOL))
            assert process.stdout is not None
            answer: TokenizedPiece = pickle.load(process.stdout)
            return answer
        except (EOFError, pickle.UnpicklingError):
            raise self._ended(process, piece) from None
        finally:
            self._idle.put(process)

    def _send(self, process: subprocess.Popen[bytes], message: bytes) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(message)
            process.stdin.flush()
        except BrokenPipeError:
            raise self._ended(process) from None

    @staticmethod
    def _ended(process: subprocess.Popen[bytes], piece: Piece | None = None) -> LoraError:
        status = process.wait()
        if piece is not None and status == -getattr(signal, "SIGPROF", 0):
            return InputError(
                f"{piece.label} {piece.numbers[0]} to {piece.numbers[-1]}: one of these rows takes "
                "longer to render and tokenize than any honest one; look at it, and at what the "
                "chat template does."
            )
        return LoraError(
            f"A process that tokenizes the data has ended (exit status {status}); it may have run "
            "out of memory."
        )
