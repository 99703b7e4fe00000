"""Puts a tiny run through every fault and writes the table of docs/reliability.md.

    python -m scripts.reliability.faults [--quick] [--write]

About ten minutes on two cores; --quick tries a few of each. Without --write the table is only
printed.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from scripts.reliability.case import Case, Tally, quiet
from scripts.reliability.devices import device_lost
from scripts.reliability.disk import crashes, directory_removed, full_disk, no_place
from scripts.reliability.processes import kills, signals, two_runs

PAGE = Path(__file__).parent.parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
HEAD = "| fault | times | what happened | adapters byte-identical |\n| --- | --- | --- | --- |"


def main() -> None:
    """Tries all; exit status 1 where something was wrong."""
    quick = "--quick" in sys.argv
    os.environ.setdefault("LORA_WEBGPU", "wgpu")
    quiet()
    with tempfile.TemporaryDirectory() as name:
        case = Case(Path(name) / "case")
        short = Case(Path(name) / "short", {"steps": 8, "save_every": 2, "eval_every": 4})
        few = 2 if quick else 20
        rows: list[Callable[[], Tally | list[Tally] | None]] = [
            lambda: kills(case, 3 if quick else 100),
            lambda: signals(case, "SIGTERM", few),
            lambda: signals(case, "SIGINT", few),
            lambda: signals(case, "SIGHUP", few),
            lambda: two_runs(case, few),
            lambda: crashes(short),
            lambda: full_disk(case, 4 if quick else 30),
            lambda: no_place(case),
            lambda: directory_removed(case, few // 2),
            lambda: device_lost(case, few, "stop"),
            lambda: device_lost(case, few, "retry"),
        ]
        tallies: list[Tally] = []
        for make in rows:
            start = time.monotonic()
            made = make()
            found = made if isinstance(made, list) else [made] if made is not None else []
            for tally in found:
                print(tally.row(), f"[{time.monotonic() - start:.0f} s]", flush=True)
            tallies += found
    table = "\n".join([HEAD, *(tally.row() for tally in tallies)])
    print(f"\n{table}")
    if "--write" in sys.argv:
        text = PAGE.read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
    wrong = any("WRONG" in tally.row() or tally.same < tally.count for tally in tallies)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
