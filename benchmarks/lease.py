"""All that a lent GPU is to show, in the order of what it is worth, as far as the minutes reach.

Device time is short and a command there ends after ten minutes, so that what to run is written down
beforehand. Each part is a command of its own with a limit; its output goes to a file, and a line
here says how it ended. What is left of the time decides whether the next part begins.

    python benchmarks/lease.py --seconds 560 --output DIR [PART …]
    python benchmarks/lease.py --list
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

_ROOT = Path(__file__).parent.parent
_LEAST = 20  # seconds that a part must still have to be worth its start


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        arguments: of Python; {out} is the folder of results.
        seconds: after which it is ended.
        shows: for what.
    """

    arguments: str
    seconds: int
    shows: str


def parts() -> dict[str, Part]:
    """Those of benchmarks/lease.yaml, in order."""
    text = (Path(__file__).parent / "lease.yaml").read_text()
    return {
        name: Part(found["run"], found["seconds"], found["shows"])
        for name, found in yaml.safe_load(text).items()
    }


def run_parts(known: Mapping[str, Part], names: Sequence[str], seconds: float, output: Path) -> int:
    """Runs parts in turn; returns how many did not end well.

    Args:
        known: what there is.
        names: of these.
        seconds: for all together.
        output: where results and each part's output go.
    """
    output.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + seconds, 0
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    for name in names:
        part, left = known[name], end - time.monotonic()
        if left < _LEAST:
            print(f"{name}: not begun, {left:.0f} s are left", flush=True)
            continue
        began = time.monotonic()
        command = [sys.executable, *part.arguments.format(out=output).split()]
        with open(output / f"{name}.log", "wb") as log:
            try:
                status: int | str = subprocess.run(
                    command, cwd=_ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                    timeout=min(part.seconds, left),
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                status = "out of time"
        failed += status != 0
        print(f"{name}: {status}, {time.monotonic() - began:.0f} s", flush=True)
        for line in (output / f"{name}.log").read_text(errors="replace").splitlines()[-3:]:
            print(f"  {line[:160]}", flush=True)
    return failed


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", metavar="PART", help="by default all, in order")
    parser.add_argument("--seconds", type=float, default=560.0, help="for all together")
    parser.add_argument("--output", type=Path, default=Path("/tmp/results"))
    parser.add_argument("--list", action="store_true", help="say what there is")
    given, known = parser.parse_args(), parts()
    if given.list:
        for name, part in known.items():
            print(f"{name:14} {part.seconds:4} s  {part.shows}\n{'':22}{part.arguments}")
        return
    if unknown := set(given.parts) - set(known):
        parser.error(f"no such part: {', '.join(sorted(unknown))} (--list names them)")
    sys.exit(min(1, run_parts(known, given.parts or list(known), given.seconds, given.output)))


if __name__ == "__main__":
    main()
