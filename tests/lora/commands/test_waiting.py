"""The line that says what is under way where a command has nothing to print yet."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora.commands.waiting import waiting
from lora.shaders.stages import stage
from tests.support.tiny_run import write_run

STOPPING = "Stopping \N{HORIZONTAL ELLIPSIS}"


def test_nothing_where_stderr_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with waiting() as tell:
        tell("Evaluating")
        stage("Loading the model")
    assert capfd.readouterr() == ("", "")


def on_terminal(
    *arguments: str, interrupted_at: bytes | None = None, tell: str | None = None
) -> tuple[str, str]:
    """What a process of Python writes to a pipe on stdout, and to a terminal on stderr.

    Args:
        interrupted_at: after this on stderr it gets a Ctrl-C.
        tell: after this on stderr it gets a line on stdin.
    """
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "40", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=follower, env=environment,
    )  # fmt: skip
    assert process.stdin is not None
    os.close(follower)
    seen = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # Linux says the end so
            break
        seen += part
        if interrupted_at is not None and interrupted_at in seen:
            process.send_signal(signal.SIGINT)
            interrupted_at = None
        if tell is not None and tell.encode() in seen:
            process.stdin.write(b"\n")
            process.stdin.flush()
            tell = None
        if not part:
            break
    os.close(leader)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0
    return printed.decode(), seen.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_an_evaluation_into_a_pipe_shows_how_far_it_is(tmp_path: Path) -> None:
    """stdout has the result alone; the terminal on stderr what is under way, and then nothing."""
    printed, seen = on_terminal("-m", "lora", "eval", str(write_run(tmp_path)), "--examples", "0")
    assert "Evaluating base, 0/3" in seen
    assert seen.rstrip().endswith("\x1b[2K")  # the line is gone
    assert printed.startswith("3 examples\n") and "\x1b" not in printed


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_what_else_is_said_has_a_line_of_its_own() -> None:
    code = """
import sys
from lora.commands.waiting import waiting
with waiting("Loading"):
    print("By the way.", file=sys.stderr)
"""
    _, seen = on_terminal("-c", code)
    assert re.search(r"\x1b\[2KBy the way\.[^\n]*\n.*Loading", seen, re.DOTALL), seen


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_ctrl_c_is_acknowledged_while_the_main_thread_is_elsewhere() -> None:
    # Who runs the tests in the background has SIGINT ignored, and so would the child.
    code = """
import signal
from lora.commands.waiting import waiting
from tests.support.stuck import until_told
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with waiting("Computing"):
        until_told()
except KeyboardInterrupt:
    print("interrupted")
"""
    printed, seen = on_terminal("-c", code, interrupted_at=b"0:00:01", tell=STOPPING)
    assert printed == "interrupted\n" and STOPPING in seen
