"""What a run's metrics.jsonl says of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class History:
    """The lines of a metrics.jsonl.

    Attributes:
        steps: one a step, in order.
        evaluations: one an evaluation.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> History:
        """Of a file; empty where there is none. Lines that are none of ours are passed over."""
        history = cls()
        try:
            if not path.is_file() or path.stat().st_size > _MOST_BYTES:  # a device has no end
                return history
            lines = path.read_text(errors="replace").splitlines()
        except OSError:
            return history
        for line in lines:
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(values, dict) or not isinstance(values.get("step"), int):
                continue
            if "eval_loss" in values:
                history.evaluations.append(values)
            elif "loss" in values:
                history.steps.append(values)
        return history

    def past(self) -> list[tuple[int, dict[str, float]]]:
        """The evaluations' metrics by step; one that was no number is NaN."""
        return [
            (
                line["step"],
                {
                    key: float("nan") if value is None else float(value)
                    for key, value in line.items()
                    if key.startswith("eval_") and isinstance(value, int | float | None)
                },
            )
            for line in self.evaluations
        ]

    def sum_of(self, key: str) -> float:
        """Of all steps' numbers."""
        return sum(numbers(self.steps, key))


def steps_of(path: Path) -> list[int]:
    """The steps that the lines of a file are of; none where there is no file."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return [step for step in found if isinstance(step, int)]


def numbers(lines: list[dict[str, Any]], key: str) -> list[float]:
    """What lines have under a key, where that is a number."""
    found = (line.get(key) for line in lines)
    return [float(v) for v in found if isinstance(v, int | float) and not isinstance(v, bool)]
