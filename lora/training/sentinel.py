"""Watches over the processes of a run, from a process of its own; see `lora.training.watch`.

A launcher of MPI kills the others as soon as one is killed, so that none of them can tell why: this
process is none of the launcher's, and says it. It knows nothing of the rest of the program and
starts at once. What goes over its connections is lines of JSON.

    in: {"token", "rank", "host"} first; {"failed": cause, "status"}; {"bye": true}
    out: {"end": status}, upon which a process ends itself
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from contextlib import suppress

GRACE = 0.7  # seconds that others have to report the same, before one report is shown
FIRST = 120.0  # seconds within which somebody must connect
_MOST = 1 << 16  # bytes of a line
_KILLED = (
    "was killed or crashed: its process ended without a word (kill -9, memory that ran out, a "
    "crash of a driver, or its host went down). The checkpoints before it stay; go on with "
    "--resume."
)


class _Watched:
    """A connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.read = b""
        self.rank: int | None = None  # until it has said the token
        self.host = ""
        self.gone = False  # said bye, or failed


class Sentinel:
    """The server.

    Args:
        size: processes of the run.
        token: that each must know.
        server: a listening socket.
    """

    def __init__(self, size: int, token: str, server: socket.socket) -> None:
        self._size = size
        self._token = token
        self._server = server
        self._selector = selectors.DefaultSelector()
        self._selector.register(server, selectors.EVENT_READ)
        self._watched: list[_Watched] = []
        self._failed: dict[int, tuple[str, str, int]] = {}  # host, cause, status by rank
        self._reported_at: float | None = None
        self._ended = False
        self._seen = False

    def run(self) -> None:
        """Until all processes have ended."""
        started = time.monotonic()
        while True:
            for key, _ in self._selector.select(0.1):
                if key.data is None:
                    self._accept()
                else:
                    self._hear(key.data)
            known = [one for one in self._watched if one.rank is not None]
            self._seen |= bool(known)
            if self._reported_at is not None and not self._ended:
                waited = time.monotonic() - self._reported_at > GRACE
                if waited or len(self._failed) == self._size:
                    self._report()
            if self._seen and not self._watched:
                return
            if not self._seen and time.monotonic() - started > FIRST:
                return

    def _accept(self) -> None:
        connection, _ = self._server.accept()
        connection.setblocking(False)
        watched = _Watched(connection)
        self._watched.append(watched)
        self._selector.register(connection, selectors.EVENT_READ, watched)

    def _hear(self, one: _Watched) -> None:
        try:
            data = one.connection.recv(_MOST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close(one)
            if one.rank is not None and not one.gone and not self._ended and not self._failed:
                self._end(f"rank {one.rank} on {one.host} {_KILLED}", 1)
            return
        one.read += data
        *lines, one.read = one.read.split(b"\n")
        try:
            for line in lines:
                self._take(one, json.loads(line))
            if len(one.read) > _MOST:
                raise ValueError("a line too long")
        except (ValueError, KeyError, TypeError, AttributeError):
            self._close(one)  # nobody of ours

    def _take(self, one: _Watched, message: dict[str, object]) -> None:
        if one.rank is None:
            if message["token"] != self._token:
                raise ValueError("a stranger")
            one.rank, one.host = int(str(message["rank"])), str(message["host"])
            if self._ended:
                self._tell(one, 1)
        elif "failed" in message:
            one.gone = True
            status = int(str(message["status"]))
            self._failed[one.rank] = one.host, str(message["failed"]), status
            if self._reported_at is None:
                self._reported_at = time.monotonic()
        elif "bye" in message:
            one.gone = True

    def _report(self) -> None:
        rank = min(self._failed)
        # What all report is nobody's fault in particular; of several, the first that came.
        first = next(iter(self._failed))
        causes = {cause for _, cause, _ in self._failed.values()}
        if len(self._failed) == self._size and len(causes) == 1:
            _, cause, status = self._failed[rank]
            self._end(cause, status)
            return
        host, cause, status = self._failed[first]
        self._end(f"rank {first} on {host}: {cause}", status)

    def _end(self, message: str, status: int) -> None:
        self._ended = True
        print(f"lora: {message}", file=sys.stderr, flush=True)
        for one in self._watched:
            self._tell(one, status)

    def _tell(self, one: _Watched, status: int) -> None:
        with suppress(OSError):
            one.connection.sendall(json.dumps({"end": status}).encode() + b"\n")

    def _close(self, one: _Watched) -> None:
        self._selector.unregister(one.connection)
        self._watched.remove(one)
        one.connection.close()


def main() -> None:
    """Reads its settings from stdin, a line of JSON, and tells its port on stdout."""
    settings = json.loads(sys.stdin.readline())
    with socket.create_server((settings["address"], 0), backlog=1024) as server:
        print(server.getsockname()[1], flush=True)
        sys.stdin.close()
        sys.stdout.close()
        Sentinel(settings["size"], settings["token"], server).run()


if __name__ == "__main__":
    main()
