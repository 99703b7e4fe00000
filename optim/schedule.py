"""Learning rates by step: a climb from the first step on, then transformers' decay."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, total_steps: int, peak: float, schedule: str, warmup_steps: int
) -> float:
    """The learning rate of one optimizer step.

    The climb is (step + 1) / warmup_steps: its first step trains, too, and its last has the peak.
    (transformers' begins with a rate of 0, which wastes a step, and a run of one step trains
    nothing.) What follows is the decay of get_constant_schedule_with_warmup, get_linear_… and
    get_cosine_schedule_with_warmup of transformers, whose last step lies one above the curve's end.

    Args:
        step: counted from 0.
        total_steps: of the whole run.
        peak: the rate at the end of the warm-up.
        schedule: "constant", "linear" or "cosine".
        warmup_steps: length of the linear climb.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    length = max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return peak * max(0.0, (total_steps - step) / length)
    if schedule == "cosine":
        progress = (step - warmup_steps) / length
        return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    raise ValueError(f"schedule {schedule!r} is none of constant, linear, cosine")
