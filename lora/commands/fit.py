"""`lora plan --fit`: the largest sizes within the memory limit, as a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

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
    table = Table(box=None, pad_edge=False)
    table.add_column("recompute")
    table.add_column(f"tokens at batch_size {config.train.batch_size}", justify="right")
    table.add_column(f"batch_size at {config.data.max_length:,} tokens", justify="right")
    for name, fit in (("off", found.off), ("on", found.on)):
        sizes = [
            f"{size:,}" if size is not None else "none" for size in (fit.length, fit.batch_size)
        ]
        table.add_row(name, *sizes)
    console.print(table)
