"""What files prescribe runs in a child with limits on time and memory."""

from __future__ import annotations

import math
import operator
import os
import re
import subprocess
import sys
import time

import pytest

from lora.forward.text import bounded
from lora.forward.text.bounded import ask
from lora.shaders.errors import InputError

_WHAT = "The pattern"


def test_functions_run_in_one_child() -> None:
    first = ask(os.getpid, what=_WHAT)
    assert first != os.getpid()
    assert ask(os.getpid, what=_WHAT) == first
    assert ask(math.gcd, 12, 18, what=_WHAT) == 6


def test_what_never_ends_costs_the_child_its_life() -> None:
    started = time.process_time()
    before = ask(os.getpid, what=_WHAT)
    with pytest.raises(InputError, match="The pattern takes longer than 1 seconds"):
        ask(re.match, "(a+)+b", "a" * 64, what=_WHAT, seconds=1)
    assert time.process_time() - started < 1  # the child's time, not ours
    assert ask(os.getpid, what=_WHAT) != before


@pytest.mark.skipif(sys.platform != "linux", reason="the only system that limits memory")
def test_what_fills_the_memory_is_refused() -> None:
    with pytest.raises(InputError, match="The pattern can't be used: it asks for too much memory"):
        ask(operator.mul, "a", 3 << 30, what=_WHAT)


def test_a_child_that_is_killed_gives_an_error_and_another_one() -> None:
    with pytest.raises(InputError, match=r"ended the process that it ran in"):
        ask(os.abort, what=_WHAT)
    assert ask(math.gcd, 4, 6, what=_WHAT) == 2


def test_errors_come_back_in_one_sentence() -> None:
    with pytest.raises(InputError, match="The pattern can't be used: .*unterminated"):
        ask(re.compile, "(", what=_WHAT)
    with pytest.raises(InputError, match="not JSON serializable"):
        ask(re.compile, "a", what=_WHAT)


def test_values_that_cannot_be_sent_are_an_error() -> None:
    with pytest.raises(InputError, match="The pattern can't be given its values"):
        ask(len, lambda: 0, what=_WHAT)


def test_what_is_printed_gets_not_between_the_answers() -> None:
    assert ask(print, "\x1b[2J", what=_WHAT) is None
    assert ask(math.gcd, 4, 6, what=_WHAT) == 2


def test_the_child_ends_with_its_parent() -> None:
    code = (
        "import os; from lora.forward.text.bounded import ask; "
        "print(ask(os.getpid, what='X'), flush=True)"
    )
    shown = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert shown.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(shown.stdout), 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks there")
def test_a_fork_has_a_child_of_its_own() -> None:
    before = ask(os.getpid, what=_WHAT)
    reader, writer = os.pipe()
    fork = os.fork()
    if fork == 0:
        os.write(writer, str(ask(os.getpid, what=_WHAT)).encode())
        bounded._CHILDREN[0].end()
        os._exit(0)
    os.waitpid(fork, 0)
    assert int(os.read(reader, 20)) != before
    os.close(reader)
    os.close(writer)
    assert ask(os.getpid, what=_WHAT) == before


def test_a_bounded_process_runs_functions_itself() -> None:
    code = (
        "import os; from lora.forward.text import bounded; bounded.become_bounded(); "
        "assert bounded.ask(os.getpid, what='X') == os.getpid()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
