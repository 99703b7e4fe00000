"""benchmarks/lease.py names scripts and options that there are, and keeps to its time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def lease(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/lease.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_part_is_a_command_that_is_taken() -> None:
    """Nobody notices a wrong option before the minutes on a GPU run."""
    lines = lease("--list").stdout.splitlines()[1::2]
    assert len(lines) > 10
    for line in lines:
        target, *arguments = line.split()
        if target == "-m":
            if arguments[0] == "pytest":
                assert all((ROOT / a).exists() for a in arguments if a.startswith("tests/"))
                continue
            if arguments[0] == "lora":
                help_text = subprocess.run(
                    [sys.executable, "-m", *arguments[:2], "--help"], capture_output=True, text=True
                ).stdout
                assert all(option in help_text for option in re.findall(r"--[a-z0-9-]+", line))
                continue
            script = f"{arguments[0].replace('.', '/')}.py"
        else:
            script = target
        text = (ROOT / script).read_text()
        for option in re.findall(r"--[a-z0-9-]+", line):
            assert f'"{option}"' in text, f"{script} has no {option}"


def test_no_part_begins_without_time(tmp_path: Path) -> None:
    done = lease("--seconds", "1", "--output", str(tmp_path), "check", "suite")
    assert done.returncode == 0
    assert re.findall(r"(\w+): not begun", done.stdout) == ["check", "suite"]


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done = lease("--output", str(tmp_path), "stepps")
    assert done.returncode == 2 and "no such part: stepps" in done.stderr
