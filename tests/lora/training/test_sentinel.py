"""The sentinel, as a process with connections of its own."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora.training import sentinel

TOKEN = "secret"


class Watched:
    """A rank's connection."""

    def __init__(self, port: int, rank: int, token: str = TOKEN) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.say(token=token, rank=rank, host=f"node{rank}")

    def say(self, **message: object) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def hear(self) -> dict | None:
        """What it is told; None where the connection was closed."""
        read = b""
        while not read.endswith(b"\n"):
            data = self.socket.recv(1000)
            if not data:
                return None
            read += data
        heard: dict = json.loads(read)
        return heard


Started = tuple[subprocess.Popen[str], int]


@pytest.fixture
def started() -> Iterator[Started]:
    with subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(sentinel.__file__))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        settings = {"address": "127.0.0.1", "size": 3, "token": TOKEN}
        process.stdin.write(json.dumps(settings) + "\n")
        process.stdin.flush()
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> list[str]:
    """What it has printed once it has ended by itself."""
    process.wait(20)
    assert process.stderr is not None and process.returncode == 0
    return process.stderr.read().splitlines()


def test_a_connection_that_ends_without_a_word_is_a_rank_that_was_killed(started: Started) -> None:
    process, port = started
    ranks = [Watched(port, rank) for rank in range(3)]
    ranks[2].socket.close()
    for rank in ranks[:2]:
        assert rank.hear() == {"end": 1}
        rank.socket.close()
    (line,) = said(process)
    assert line.startswith("lora: rank 2 on node2 was killed or crashed")


def test_the_first_that_fails_is_named(started: Started) -> None:
    process, port = started
    ranks = [Watched(port, rank) for rank in range(3)]
    ranks[1].say(failed="no memory left", status=1)
    time.sleep(0.3)  # both have 0.7 s
    ranks[0].say(failed="its peer is gone", status=2)
    for rank in ranks:
        assert rank.hear() == {"end": 1}
        rank.socket.close()
    assert said(process) == ["lora: rank 1 on node1: no memory left"]


def test_what_all_report_is_nobodys_in_particular(started: Started) -> None:
    process, port = started
    ranks = [Watched(port, rank) for rank in range(3)]
    for rank in ranks:
        rank.say(failed="config.yaml: no such file", status=2)
    for rank in ranks:
        assert rank.hear() == {"end": 2}
        rank.socket.close()
    assert said(process) == ["lora: config.yaml: no such file"]


def test_a_good_end_is_silent(started: Started) -> None:
    process, port = started
    for rank in [Watched(port, rank) for rank in range(3)]:
        rank.say(bye=True)
        rank.socket.close()
    assert said(process) == []


def test_strangers_are_sent_away(started: Started) -> None:
    process, port = started
    rank, guessing = Watched(port, 0), Watched(port, 1, token="guessed")
    assert guessing.hear() is None
    guessing.socket.close()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as stranger:
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert stranger.recv(10) == b""
    rank.say(bye=True)
    rank.socket.close()
    assert said(process) == []
