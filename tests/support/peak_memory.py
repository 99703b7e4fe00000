"""How much more memory a process holds at its peak, as Linux counts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_PROCESS = Path("/proc/self")


@dataclass
class Peak:
    """Of a stretch of code.

    Attributes:
        growth: bytes above those before it; None where the system does not tell.
    """

    growth: int | None = None


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measures what it encloses; the value is there at its end."""
    peak = Peak()
    try:
        (_PROCESS / "clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
    except OSError:
        yield peak
        return
    yield peak
    peak.growth = _status("VmHWM") - before


def _status(name: str) -> int:
    """A line of the process's status, in bytes."""
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {name}")
