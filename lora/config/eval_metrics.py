"""What an evaluation comes to, by name; without pydantic, which training alone doesn't load."""

from __future__ import annotations

from collections.abc import Iterable

# What an evaluation comes to, by the name that follows `eval_`; whether more of it is better.
EVAL_METRICS = {"loss": False, "perplexity": False, "accuracy": True, "exact_match": True}


def metric_names(sets: Iterable[str] = ()) -> list[str]:
    """The metrics of an evaluation: eval_loss, …, and eval_NAME_loss, … of each named set."""
    return [
        f"eval_{part}{name}" for part in ("", *(f"{s}_" for s in sets)) for name in EVAL_METRICS
    ]


def greater_is_better(metric: str) -> bool:
    """Whether more of a metric is better."""
    return any(more and metric.endswith(name) for name, more in EVAL_METRICS.items())
