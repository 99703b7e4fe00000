"""`lora plan --fit`: the largest sizes within the memory limit, as a table."""

from __future__ import annotations

from rich.console import Console

from lora.commands.tables import Records
from lora.training.fitting import Fits
from lora.training.workload import Workload


def print_fit(console: Console, workload: Workload, found: Fits) -> None:
    """What fits: the config as it is, and the longest examples and largest micro-batches.

    Args:
        workload: of the config.
        found: by `lora.training.fitting.fits`.
    """
    config = workload.config
    again = {
        None: "does not fit, whatever is run again",
        0: "fits with no layer run again",
    }.get(found.recomputed, f"fits with {found.recomputed} of {found.layers} layers run again")
    console.print(
        f"\nWithin {found.limit / 2**30:.2f} GiB (train.memory_limit) this config {again}."
    )
    headings = (
        "recompute",
        f"tokens at batch_size {config.train.batch_size}",
        f"batch_size at {config.data.max_length:,} tokens",
    )
    rows = [
        (name, *("none" if size is None else f"{size:,}" for size in (fit.length, fit.batch_size)))
        for name, fit in (("off", found.off), ("on", found.on))
    ]
    console.print(Records(headings, rows))
