"""The command `lora bench`; lora/commands/cli.py registers it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from lora.commands.options import ConfigArgument, Overrides, WebGPUOverride, overrides


def bench_command(
    config: ConfigArgument,
    set_: Overrides = None,
    webgpu: WebGPUOverride = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Where a step's time goes, kernel by kernel, against the device's measured peaks."""
    from lora.commands.tables import table_console
    from lora.commands.waiting import waiting
    from lora.config.schema import load_config
    from lora.training.profiling import kernel_facts, kernel_table, measure_peaks, print_kernels
    from lora.training.session import TrainingSession

    loaded = load_config(config, overrides(set_, webgpu))
    with waiting() as tell:
        session = TrainingSession(loaded)
        assert session.stream is not None
        tell("Computing three steps")
        for _, batches in zip(range(3), session.stream, strict=False):
            session.step(batches)
        session.finished_steps(wait=True)
        tell("Timing kernels")
        rows = kernel_table(session)
        tell("Measuring the device's peaks")
        peaks = measure_peaks(session.device)
    if as_json:
        print(json.dumps(kernel_facts(rows, peaks), indent=2))
        return
    print_kernels(table_console(), rows, peaks)
