"""Puts a tiny run through faults and writes the table of docs/reliability.md.

    python -m scripts.reliability.faults [--quick] [--write] [--only NAME ...]

Most of an hour on two cores that others use; --quick tries a few of each. --write puts the rows
into the page, in place of those of the same faults.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from scripts.reliability.case import Case, Tally, quiet
from scripts.reliability.devices import device_lost
from scripts.reliability.disk import crashes, directory_removed, full_disk, no_place
from scripts.reliability.processes import kills, signals, two_runs
from scripts.reliability.ranks import RanksCase, rank_breaks, rank_kills, rank_signals

PAGE = Path(__file__).parent.parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
HEAD = ["| fault | times | what happened | adapters byte-identical |", "| --- | --- | --- | --- |"]
Faults = dict[str, Callable[[], "Tally | list[Tally] | None"]]


def faults(folder: Path, quick: bool) -> Faults:
    """What there is to try, by name."""
    case = Case(folder / "case")
    short = Case(folder / "short", {"steps": 8, "save_every": 2, "eval_every": 4})
    few = 2 if quick else 20
    of_two = cache(lambda: RanksCase(case))
    return {
        "kills": lambda: kills(case, 3 if quick else 100),
        "SIGTERM": lambda: signals(case, "SIGTERM", few),
        "SIGINT": lambda: signals(case, "SIGINT", few),
        "SIGHUP": lambda: signals(case, "SIGHUP", few),
        "two-runs": lambda: two_runs(case, few // 2),
        "crashes": lambda: crashes(short),
        "full-disk": lambda: full_disk(case, 4 if quick else 30),
        "places": lambda: no_place(case),
        "removed": lambda: directory_removed(case, few // 2),
        "device-stop": lambda: device_lost(case, few, "stop"),
        "device-retry": lambda: device_lost(case, few, "retry"),
        "rank-kills": lambda: rank_kills(of_two(), few),
        "rank-exceptions": lambda: rank_breaks(of_two(), few // 4 or 1, "exception"),
        "rank-devices": lambda: rank_breaks(of_two(), few // 4 or 1, "device"),
        "rank-signals": lambda: rank_signals(of_two(), few // 4 or 1),
    }


def write_rows(rows: list[str]) -> None:
    """Puts rows into the page's table, in place of those of the same faults."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    there = {_fault(line): line for line in table.splitlines() if line.startswith("| ")}
    there |= {_fault(line): line for line in [*HEAD, *rows]}
    head = [there.pop(_fault(line)) for line in HEAD]
    PAGE.write_text("\n".join([before + BEGIN, *head, *there.values(), END + after]))


def _fault(row: str) -> str:
    """What a row is about: its first cell, without what is counted there."""
    return row.split("|")[1].split(" (")[0].strip()


def main() -> None:
    """Tries what is asked for; exit status 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", nargs="*", default=None)
    given = parser.parse_args()
    os.environ.setdefault("LORA_WEBGPU", "wgpu")
    quiet()
    tallies: list[Tally] = []
    with tempfile.TemporaryDirectory() as name:
        for fault, make in faults(Path(name), given.quick).items():
            if given.only is not None and fault not in given.only:
                continue
            start = time.monotonic()
            made = make()
            found = made if isinstance(made, list) else [made] if made is not None else []
            for tally in found:
                print(tally.row(), f"[{time.monotonic() - start:.0f} s]", flush=True)
            tallies += found
    if given.write:
        write_rows([tally.row() for tally in tallies])
    wrong = any("WRONG" in tally.row() or tally.same < tally.count for tally in tallies)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
