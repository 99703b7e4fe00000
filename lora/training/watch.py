"""How a run of several processes ends when one of them does: within seconds, with one message.

A plain exception in one process of MPI leaves the others waiting for it for ever, and where one is
killed a launcher kills the rest before they can say why. So each process keeps a connection to a
sentinel (`lora/training/sentinel.py`), which rank 0 starts.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora.shaders.errors import InputError, LoraError, plain
from lora.training.communicator import Communicator, SingleProcess
from lora.training.mpi import launched_rank, launched_size, open_mpi

_CONNECT_SECONDS = 3.0  # for each address
_END_SECONDS = 15.0  # that a sentinel may take to end this process
_LOCAL = "127.0.0.1"


class Watch:
    """This process's side of it.

    Args:
        communicator: of all processes, which make one each at the same time.
        abort: ends all processes where there is no sentinel; takes the exit status.
    """

    def __init__(self, communicator: Communicator, abort: Callable[[int], Any]) -> None:
        self._rank = communicator.rank
        self._host = communicator.hosts[self._rank]
        self._abort = abort
        self._over = threading.Event()
        several = len(set(communicator.hosts)) > 1
        found = _start(communicator.size, several) if self._rank == 0 else None
        found = communicator.broadcast(found)
        self._connection: socket.socket | None = None
        if found is not None:
            addresses, port, token = found
            if self._host == communicator.hosts[0]:
                addresses = [_LOCAL]
            self._connection = _connected(addresses, port)
        if self._connection is not None:
            self._say({"token": token, "rank": self._rank, "host": self._host})
            threading.Thread(target=self._listen, name="watch", daemon=True).start()
        communicator.gather(None)  # whoever fails from here on is known to the sentinel

    def bye(self) -> None:
        """This process ends as it should."""
        self._over.set()
        self._say({"bye": True})

    def failed(self, cause: str, status: int) -> None:
        """Ends all processes, with a message that names this one; does not return."""
        self._over.set()
        if self._connection is not None and self._say({"failed": cause, "status": status}):
            time.sleep(_END_SECONDS)  # `_listen` ends this process before
        print(f"lora: rank {self._rank} on {self._host}: {cause}", file=sys.stderr, flush=True)
        self._abort(status)

    def _say(self, message: dict[str, Any]) -> bool:
        """Whether it could be sent."""
        if self._connection is None:
            return False
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def _listen(self) -> None:
        assert self._connection is not None
        read = b""
        while True:
            try:
                data = self._connection.recv(4096)
            except OSError:
                data = b""
            if not data:  # the sentinel is gone, and with it most likely rank 0's host
                if not self._over.is_set():
                    print(
                        f"lora: rank {self._rank} on {self._host} has lost rank 0's host.",
                        file=sys.stderr, flush=True,
                    )  # fmt: skip
                    os._exit(1)
                return
            read += data
            if b"\n" in read:
                with suppress(ValueError, KeyError, TypeError):
                    os._exit(int(json.loads(read.split(b"\n")[0])["end"]))
                os._exit(1)


def _start(size: int, several: bool) -> tuple[list[str], int, str] | None:
    """Starts the sentinel: the addresses to find it under, its port and token; None where it fails.

    Args:
        several: whether there are several hosts.
    """
    token = secrets.token_hex(16)
    settings = {"address": "" if several else _LOCAL, "size": size, "token": token}
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("sentinel.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a launcher that kills this process's group leaves it alone
        )
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(settings).encode() + b"\n")
        process.stdin.flush()
        port = int(process.stdout.readline())
    except (OSError, ValueError):
        return None
    process.stdin.close()
    process.stdout.close()
    process.returncode = 0  # nobody waits for it: it outlives this process
    return _addresses() if several else [_LOCAL], port, token


def _addresses() -> list[str]:
    """Under which other hosts may find this one."""
    found = []
    name = socket.gethostname()
    for asked in (name, socket.getfqdn()):
        with suppress(OSError):
            found += [str(info[4][0]) for info in socket.getaddrinfo(asked, None, socket.AF_INET)]
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: the address of the way out
        found.append(probe.getsockname()[0])
    return [address for address in dict.fromkeys([*found, name]) if not address.startswith("127.")]


def _connected(addresses: list[str], port: int) -> socket.socket | None:
    for address in addresses:
        with suppress(OSError):
            connection = socket.create_connection((address, port), timeout=_CONNECT_SECONDS)
            connection.settimeout(None)
            # A host that lost its power says nothing: after half a minute it counts as gone.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
                if hasattr(socket, name):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            return connection
    return None


@contextmanager
def joined() -> Iterator[Communicator]:
    """The processes that a launcher started together; one alone without a launcher.

    With several, whatever is raised in one ends all, with one message and its exit status.

    Raises:
        InputError: they can't reach each other.
    """
    if launched_size() == 1:
        yield SingleProcess()
        return
    try:
        communicator = open_mpi()
    except InputError:
        if launched_rank() > 0:  # one says it
            sys.exit(2)
        raise
    watch = Watch(communicator, communicator.abort)
    try:
        yield communicator
    except BaseException as error:
        if hasattr(error, "exit_code") and not hasattr(error, "format_message"):
            watch.bye()  # typer.Exit: an end that all come to together
            raise
        if "--debug" in sys.argv:
            traceback.print_exc()
        watch.failed(*_cause(error))
    watch.bye()


def _cause(error: BaseException) -> tuple[str, int]:
    """What is said of an error, and the exit status."""
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, LoraError):
        return str(error), 1
    if hasattr(error, "format_message"):  # what the command line refuses
        return str(error.format_message()), 2
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    return f"{type(error).__name__}: {plain(str(error))} (see --debug)", 1
