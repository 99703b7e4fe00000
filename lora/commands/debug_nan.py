"""`lora debug-nan`: where the numbers of a training step stop being finite."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora.commands.options import ConfigArgument, Overrides, WebGPUOverride, overrides


def debug_nan_command(
    config: ConfigArgument,
    set_: Overrides = None,
    webgpu: WebGPUOverride = None,
    resume: Annotated[bool, typer.Option(help="Begin at the last checkpoint.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="To look at, at most.")] = 10,
) -> None:
    """Which layer, kernel and tensor first goes non-finite; writes no files.

    The steps train as `lora train` would. One whose loss or gradient is not finite is run again
    kernel by kernel. Exit status 1 where there was one.
    """
    from lora.config.schema import load_config
    from lora.training.checkpoint import device_of_then, started_at
    from lora.training.resuming import resume as put_where_it_stood
    from lora.training.session import TrainingSession

    loaded = load_config(config, overrides(set_, webgpu))
    output = Path(loaded.output)
    device = device_of_then(loaded) if resume else None
    session = TrainingSession(loaded, device=device, started=started_at(output) if resume else None)
    if resume:
        put_where_it_stood(session, output)
    looked_at = 0
    for metrics in session.steps(pause=lambda: True):
        if metrics is None:
            if looked_at == steps:
                break
            continue
        looked_at += 1
        typer.echo(
            f"step {metrics.step}: loss {metrics.loss:.6g}, gradient's norm {metrics.grad_norm:.6g}"
        )
        if metrics.skipped:
            culprit = session.find_not_finite(metrics.step)
            typer.echo(
                f"It begins in {culprit}."
                if culprit is not None
                else "Run again, it had finite numbers only: suspect the driver or its memory."
            )
            raise typer.Exit(1)
    typer.echo(f"{looked_at} steps, and all that they wrote was finite.")
