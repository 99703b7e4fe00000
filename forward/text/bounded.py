"""A child process for work that files prescribe: chat templates, patterns, foreign tokenizers.

A template or a regular expression out of a file is a program, and one that runs for hours or fills
the memory is a few characters long. `ask` runs a function in a child of this process that has
limits on time and memory; who exceeds them costs the child its life and gives a sentence here.

The time is the processor's, so that a busy machine refuses nothing. Where the operating system has
no such timer (Windows) it is the clock's, and where it limits no process's memory (macOS) the time
alone counts. What comes back is JSON, not pickle: the child may have been taken over.

A process that is such a child itself (`become_bounded`, for pools) runs functions directly.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

from lora.shaders.errors import InputError, LoraError
from lora.shaders.untrusted import is_panic, reason_of

SECONDS = 2.0  # of the processor, for a template or a text; honest ones take thousandths of one
MOST_BYTES = 2 << 30  # of addresses: an idle child with the tokenizers library has half of it
MOST_ANSWER = 1 << 28  # bytes
_PATIENCE = 20.0  # times as long by the clock: a machine may be busy, and the child may swap
_HEAD = struct.Struct("<Q")
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from lora.forward.text.bounded import serve; serve()"
)
# Exit statuses of who ran out of time: of the timer, and of a limit that the user had set before.
_TIMED_OUT = [-getattr(signal, n) for n in ("SIGPROF", "SIGXCPU") if hasattr(signal, n)]
_is_bounded = False


def become_bounded() -> None:
    """Marks this process as a child with limits: `ask` runs functions right here.

    For the processes of a pool, whose parent watches their time.
    """
    global _is_bounded
    _is_bounded = True
    _limit_memory(MOST_BYTES)


def ask(function: Callable[..., Any], *arguments: Any, what: str, seconds: float = SECONDS) -> Any:
    """What a function gives, run within limits.

    Args:
        function: of a module, by its name there; what it gives must be JSON's (tuples come back as
            lists).
        arguments: whatever pickle takes.
        what: this is, for the message, as the beginning of a sentence: "The chat template".
        seconds: of the processor.

    Raises:
        InputError: the function raises it, or it takes too long or too much memory.
    """
    if _is_bounded:
        return _run(function, arguments)
    with _LOCK:
        if _CHILDREN and _CHILDREN[0].owner != os.getpid():
            _CHILDREN.clear()  # a fork has none of its parent's threads and must not use its pipes
        if not _CHILDREN:
            _CHILDREN.append(_Child())
        child = _CHILDREN[0]
        try:
            return child.ask(function, arguments, what, seconds)
        except _GoneError as error:
            _CHILDREN.clear()
            raise InputError(str(error)) from None
        except BaseException as error:
            if not isinstance(error, LoraError):  # Ctrl-C: an answer may still be under way
                _CHILDREN.clear()
                child.end()
            raise


class _GoneError(Exception):
    """The child has ended; the message says why."""


class _Child:
    """A process that runs one function at a time."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        environment = {
            **os.environ,
            "OPENBLAS_NUM_THREADS": "1",
            "RAYON_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps([os.path.abspath(p) for p in sys.path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # where a library in Rust prints that it panics
            env=environment,
            bufsize=0,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self._begun = b""  # of an answer, where waiting for it takes a byte

    def ask(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], what: str, seconds: float
    ) -> Any:
        task = function.__module__, function.__qualname__, arguments, seconds
        try:
            request = pickle.dumps(task, pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # PicklingError, TypeError, AttributeError, RecursionError
            raise InputError(f"{what} can't be given its values: {reason_of(error)}.") from error
        limit = seconds * (_PATIENCE if hasattr(signal, "setitimer") else 1.0) + 10.0
        late = False
        try:
            _write(self._requests, request)
            late = not self._answered(limit)
            answer = None if late else _read(self._answers, self._begun)
        except (OSError, EOFError):
            answer = None
        if answer is None:
            status = self.end()
            raise _GoneError(self._why(status, late, what, seconds))
        values = json.loads(answer)
        if "refused" in values:
            raise InputError(values["refused"])
        if "error" in values:
            raise InputError(f"{what} can't be used: {values['error']}.")
        return values["value"]

    def _answered(self, limit: float) -> bool:
        """Waits for the beginning of an answer; False if none comes within so many seconds."""
        if os.name == "posix":
            return bool(select.select([self._answers], [], [], limit)[0])
        watch = threading.Timer(limit, self._process.kill)  # Windows can't wait for a pipe
        watch.daemon = True
        watch.start()
        try:
            self._begun = self._answers.read(1)
        finally:
            watch.cancel()
        return bool(self._begun)

    @staticmethod
    def _why(status: int, late: bool, what: str, seconds: float) -> str:
        if late or status in _TIMED_OUT:
            return (
                f"{what} takes longer than {seconds:.0f} seconds, which no honest one does; look "
                "at what it says, or take another one."
            )
        return (
            f"{what} ended the process that it ran in (status {status}): it may ask for more than "
            f"{MOST_BYTES >> 30} GiB of memory. Look at what it says, or take another one."
        )

    def end(self) -> int:
        """Ends the process and returns its exit status."""
        # Closed pipes end an idle one; what is at work does not see that.
        for pipe in (self._requests, self._answers):
            with suppress(OSError):
                pipe.close()
        try:
            return self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


_CHILDREN: list[_Child] = []  # one at most
_LOCK = threading.RLock()


@atexit.register
def _end_children() -> None:
    while _CHILDREN:
        child = _CHILDREN.pop()
        if child.owner == os.getpid():
            child.end()


def serve() -> None:
    """What the child does: runs what it is asked for until its input ends."""
    become_bounded()
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", buffering=0)
    # Nothing that is printed on the way may get between the answers.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    with suppress(EOFError, OSError, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
        while True:
            _write(answers, _answer(_read(requests)))


def _answer(request: bytes) -> bytes:
    has_timer = hasattr(signal, "setitimer")
    try:
        module, name, arguments, seconds = pickle.loads(request)
        function = getattr(importlib.import_module(module), name)
        if has_timer:  # its signal ends the process, in whatever code it is
            signal.setitimer(signal.ITIMER_PROF, seconds)
        value = _run(function, arguments)
        text = json.dumps({"value": value}).encode()
        if len(text) > MOST_ANSWER:
            raise MemoryError
        return text
    except InputError as error:
        return json.dumps({"refused": str(error)}).encode()
    except MemoryError:
        return json.dumps({"error": "it asks for too much memory"}).encode()
    except RecursionError:
        return json.dumps({"error": "it is nested too deeply"}).encode()
    except Exception as error:
        return json.dumps({"error": reason_of(error)}).encode()
    finally:
        if has_timer:
            signal.setitimer(signal.ITIMER_PROF, 0)


def _run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return function(*arguments)
    except Exception:
        raise
    except BaseException as error:
        if not is_panic(error):
            raise
        raise ValueError(f"a library gave up on it ({reason_of(error)})") from None


def _limit_memory(n_bytes: int) -> None:
    if sys.platform == "darwin":  # takes the limit and doesn't keep it, or refuses it
        return
    with suppress(ImportError, OSError, ValueError):
        import resource  # Windows has none

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard == resource.RLIM_INFINITY or hard > n_bytes:
            resource.setrlimit(resource.RLIMIT_AS, (n_bytes, hard))


def allow_memory(n_bytes: int) -> None:
    """Raises the limit of this child, for a file whose honest content needs more."""
    if _is_bounded:
        _limit_memory(n_bytes)


def _write(pipe: IO[bytes], content: bytes) -> None:
    left = memoryview(_HEAD.pack(len(content)) + content)
    while left:
        left = left[pipe.write(left) or 0 :]
    pipe.flush()


def _read(pipe: IO[bytes], begun: bytes = b"") -> bytes:
    (length,) = _HEAD.unpack(begun + _read_exactly(pipe, _HEAD.size - len(begun)))
    return _read_exactly(pipe, length)


def _read_exactly(pipe: IO[bytes], length: int) -> bytes:
    parts = []
    while length:
        part = pipe.read(min(length, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
