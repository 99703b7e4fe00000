"""Files that are whole or absent, and what killed processes leave."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lora.storage import files
from lora.storage.children import run_module
from lora.storage.files import clean_leftovers, new_directory, owner, write_file
from lora.storage.gguf_output import new_file

KILLED = """
import os, signal, sys
from pathlib import Path
from lora.storage.files import new_directory
with new_directory(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""
PARENT = """
import os, signal, sys, threading, time
from lora.storage.children import run_module
threading.Timer(60, os._exit, [1]).start()
run_module(sys.argv[1])
"""
CHILD = """
import os, sys, time
from pathlib import Path
Path(os.environ["PID_FILE"]).write_text(str(os.getpid()))
time.sleep(60)
"""


def is_running(process: int) -> bool:
    """Whether it is there, and not merely waiting to be asked for its status."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_what_a_killed_process_left_goes_at_the_next_start(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and left.name.endswith(".tmp")
    mine = tmp_path / f".other.{owner()}-01234567.tmp"
    elsewhere = tmp_path / ".other.ffff1-01234567.tmp"
    for path in (mine, elsewhere):  # of a process that is there, and of another host
        path.write_text("being written")
    (tmp_path / ".hidden.tmp").write_text("the user's")
    (tmp_path / ".old.0123abcd.tmp").write_text("of a version that wrote no process")
    clean_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [".hidden.tmp", mine.name, elsewhere.name]
    )
    clean_leftovers(tmp_path, all_owners=True)
    assert [p.name for p in tmp_path.iterdir()] == [".hidden.tmp"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_exports_half_goes_with_the_next(tmp_path: Path) -> None:
    """Whatever the next one's name is; the temporary file of a living process stays."""
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "model.gguf")], check=False)
    mine = tmp_path / f".other.gguf.{owner()}-01234567.tmp"
    mine.write_text("being written")
    assert len(list(tmp_path.iterdir())) == 2
    with new_file(tmp_path / "another.gguf") as temporary:
        temporary.write_bytes(b"whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([mine.name, "another.gguf"])


def test_what_was_about_to_be_replaced_comes_back(tmp_path: Path) -> None:
    """Killed between the two renames of `new_directory`."""
    (tmp_path / ".out.0123abcd.old").mkdir()
    (tmp_path / ".there.0123abcd.old").mkdir()
    (tmp_path / "there").write_text("newer")
    clean_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "there"]


def test_a_directory_is_replaced_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("first", "second"):
        with new_directory(tmp_path / "out") as folder:
            write_file(folder / "file", text)
        assert (tmp_path / "out" / "file").read_text() == text
    replace, calls = os.replace, []

    def failing(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:  # the new one's name
            raise OSError("the disk is gone")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(OSError, match="gone"), new_directory(tmp_path / "out"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "second"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux for processes")
def test_children_end_with_their_parent(tmp_path: Path) -> None:
    """However it ends: SIGKILL leaves it no word to say."""
    (tmp_path / "sleeps.py").write_text(CHILD)
    pid_file = tmp_path / "pid"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()]),
        "PID_FILE": str(pid_file),
    }
    with subprocess.Popen([sys.executable, "-c", PARENT, "sleeps"], env=environment) as parent:
        wait_until(lambda: pid_file.exists() and pid_file.read_text() != "")
        child = int(pid_file.read_text())
        assert is_running(child)
        parent.kill()
    wait_until(lambda: not is_running(child))


def wait_until(condition: Callable[[], bool]) -> None:
    """Looks again and again, for half a minute at most."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_childs_output_and_status_come_back() -> None:
    done = run_module("json.tool", ["--help"])
    assert done.returncode == 0 and "usage" in done.stdout
    assert run_module("json.tool", ["/nowhere/at/all"]).returncode != 0
    with pytest.raises(subprocess.TimeoutExpired):
        run_module("http.server", ["0"], timeout=1.0)
