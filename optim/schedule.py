"""Learning rates by step, as transformers' schedulers give them."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, total_steps: int, peak: float, schedule: str, warmup_steps: int
) -> float:
    """The learning rate of one optimizer step.

    Follows get_constant_schedule_with_warmup, get_linear_… and get_cosine_schedule_with_warmup of
    transformers: the first step of a warm-up has rate 0, and the last step of a run lies one step
    above the end of the curve.

    Args:
        step: counted from 0.
        total_steps: of the whole run.
        peak: the rate at the end of the warm-up.
        schedule: "constant", "linear" or "cosine".
        warmup_steps: length of the linear climb.
    """
    if step < warmup_steps:
        return peak * step / max(1, warmup_steps)
    if schedule == "constant":
        return peak
    length = max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return peak * max(0.0, (total_steps - step) / length)
    if schedule == "cosine":
        progress = (step - warmup_steps) / length
        return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    raise ValueError(f"schedule {schedule!r} is none of constant, linear, cosine")
