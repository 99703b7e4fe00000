"""Learning rates by step: a climb from the first step on, then transformers' decay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

# What each schedule may be told beside its length: transformers' words and defaults.
SCHEDULES: Mapping[str, Mapping[str, float | str | None]] = {
    "constant": {},
    "constant_with_warmup": {},
    "linear": {},
    "cosine": {"num_cycles": 0.5},
    "cosine_with_min_lr": {"num_cycles": 0.5, "min_lr": None, "min_lr_rate": None},
    "cosine_with_restarts": {"num_cycles": 1},
    "inverse_sqrt": {"timescale": None},
    "warmup_stable_decay": {
        "num_decay_steps": None, "num_stable_steps": None, "decay_type": "cosine",
        "min_lr_ratio": 0.0, "num_cycles": 0.5,
    },
}  # fmt: skip
DECAY_TYPES = ("linear", "cosine", "1-sqrt")
_USUAL_TIMESCALE = 10_000  # of inverse_sqrt without a warm-up


@dataclass(frozen=True)
class Schedule:
    """How the rate goes over a run.

    Attributes:
        name: of SCHEDULES.
        total_steps: of the whole run.
        peak: the rate at the end of the warm-up.
        warmup_steps: length of the linear climb.
        options: what SCHEDULES lists for the name, where it is not the default.
    """

    name: str
    total_steps: int
    peak: float
    warmup_steps: int
    options: Mapping[str, float | str] = field(default_factory=dict)

    def rate(self, step: int) -> float:
        """The learning rate of one optimizer step, counted from 0."""
        return learning_rate(
            step,
            total_steps=self.total_steps,
            peak=self.peak,
            schedule=self.name,
            warmup_steps=self.warmup_steps,
            options=self.options,
        )


def learning_rate(
    step: int,
    *,
    total_steps: int,
    peak: float,
    schedule: str,
    warmup_steps: int,
    options: Mapping[str, float | str] | None = None,
) -> float:
    """The learning rate of one optimizer step.

    The climb is (step + 1) / warmup_steps: its first step trains, too, and its last has the peak.
    (transformers' begins with a rate of 0, which wastes a step, and a run of one step trains
    nothing.) What follows is the decay of transformers' schedule of that name (`SchedulerType`),
    whose last step lies one above the curve's end.

    Args:
        step: counted from 0.
        total_steps: of the whole run.
        peak: the rate at the end of the warm-up.
        schedule: of SCHEDULES.
        warmup_steps: length of the linear climb.
        options: see `Schedule`.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is none of {', '.join(SCHEDULES)}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    given = {**SCHEDULES[schedule], **(options or {})}
    past, length = step - warmup_steps, max(1, total_steps - warmup_steps)
    if schedule == "linear":  # 0 at the end, also of a run that is warm-up alone
        return peak * max(0.0, (total_steps - step) / length)
    return peak * max(0.0, _decay(schedule, past, length, warmup_steps, given, peak))


def _decay(
    schedule: str,
    past: int,
    length: int,
    warmup_steps: int,
    given: Mapping[str, float | str | None],
    peak: float,
) -> float:
    """The share of the peak `past` steps behind the warm-up, of `length` there."""
    if schedule in ("constant", "constant_with_warmup"):
        return 1.0
    if schedule == "inverse_sqrt":
        timescale = _number(given["timescale"]) or warmup_steps or _USUAL_TIMESCALE
        return 1.0 / math.sqrt((past + timescale) / timescale)
    cycles = _number(given["num_cycles"]) or 0.0
    if schedule == "cosine_with_restarts":
        place = past / length
        return 0.0 if place >= 1.0 else 0.5 * (1.0 + math.cos(math.pi * (cycles * place % 1.0)))
    if schedule == "warmup_stable_decay":
        return _stable_decay(past, length, given, cycles)
    factor = 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * past / length))
    if schedule == "cosine":
        return factor
    least, share = _number(given["min_lr"]), _number(given["min_lr_rate"])
    floor = share if share is not None else (least or 0.0) / peak
    return factor * (1.0 - floor) + floor


def _stable_decay(
    past: int, length: int, given: Mapping[str, float | str | None], cycles: float
) -> float:
    """Warmup-stable-decay: the peak, then one of DECAY_TYPES down to min_lr_ratio."""
    decaying, stable = _number(given["num_decay_steps"]), _number(given["num_stable_steps"])
    if decaying is None:
        raise ValueError("warmup_stable_decay needs num_decay_steps")
    floor = _number(given["min_lr_ratio"]) or 0.0
    stable = length - decaying if stable is None else stable
    if past < stable:
        return 1.0
    if past >= stable + decaying:
        return floor
    place = (past - stable) / max(1, decaying)
    factor = {
        "linear": 1.0 - place,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * place)),
        "1-sqrt": 1.0 - math.sqrt(place),
    }[str(given["decay_type"])]
    return factor * (1.0 - floor) + floor


def _number(value: float | str | None) -> float | None:
    return None if value is None else float(value)
