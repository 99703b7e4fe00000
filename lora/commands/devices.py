"""The command `lora devices`; lora/commands/cli.py registers it."""

from __future__ import annotations

import json
import platform
from collections import Counter
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lora.shaders.errors import InputError

if TYPE_CHECKING:  # imported where they are used: --help is quick
    from lora.checks.suite import Result
    from lora.shaders.device import Device

_REPORT = Path("lora-check.json")


def devices_command(
    check: Annotated[
        bool, typer.Option("--check", help="Run every kernel against its reference on one.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="For --check: auto, an index, or part of a name.")
    ] = "auto",
    output: Annotated[
        Path, typer.Option(help="For --check: the file to attach to a report.")
    ] = _REPORT,
) -> None:
    """The devices that WebGPU sees; with --check, whether one computes what it should.

    The check runs every kernel on small shapes against numpy in float64. A minute or two; exit
    status 1 where one failed. The file it writes says all that a report needs.
    """
    if check:
        if not run_check(device, output):
            raise typer.Exit(1)
        return
    if device != "auto" or output != _REPORT:
        raise InputError("--device and --output belong to --check: add it, or leave them out.")
    from lora.shaders.device import list_devices

    found = list_devices()
    if not found:
        raise InputError(
            "WebGPU found no device on this machine. Install a Vulkan driver "
            "(Debian: apt-get install mesa-vulkan-drivers)."
        )
    table = Table("index", "name", "kind", "backend", "driver", "binding", "workgroup", "features")
    for index, one in enumerate(found):
        info, limits = one.info, one.limits
        table.add_row(
            str(index),
            info["device"],
            info["adapter_type"],
            info["backend_type"],
            info["description"],
            f"{limits['max-storage-buffer-binding-size'] / 2**20:.0f} MiB",
            f"{limits['max-compute-workgroup-storage-size'] / 2**10:.0f} KiB",
            ", ".join(f for f in ("shader-f16", "subgroup", "timestamp-query")
                      if f in one.features),
        )  # fmt: skip
    Console().print(table)


def run_check(wanted: str, output: Path) -> bool:
    """Checks a device, prints a table of 80 columns and writes the file; whether all passed.

    The file is written anew after each check and names the next one: a driver that ends the
    process leaves it behind.

    Raises:
        InputError: there is no such device, or the file can't be written.
    """
    from lora.checks.suite import ALL_CHECKS, run_checks
    from lora.shaders.device import Device

    first = [Device(wanted)]  # a wrong name is the user's error
    report = {**device_facts(first[0]), "finished": False, "checks": []}
    print(f"{report['device']['device']}, {report['device']['description']}")
    print(f"{'kernel':<24}{'shape':<32}{'error':>8} {'bound':>7} result")
    counts: Counter[str] = Counter()
    names = [f"{c.kernel} {c.case}" for c in ALL_CHECKS]
    write_report(output, {**report, "running": names[0]})

    def open_device() -> Device:
        return first.pop() if first else Device(wanted)

    for index, result in enumerate(run_checks(open_device, ALL_CHECKS)):
        counts[result.status] += 1
        report["checks"].append(facts_of(result))
        print(line_of(result), flush=True)
        running = names[index + 1] if index + 1 < len(names) else None
        write_report(output, {**report, "running": running})
    write_report(output, {**report, "finished": True})
    print(", ".join(f"{n} {status}" for status, n in sorted(counts.items())) + f"; see {output}")
    return counts["failed"] == 0


def line_of(result: Result) -> str:
    """A line of the table, and below a check that did not pass the reason."""
    compared = result.comparison
    figures = f"{'':>16}"
    if compared is not None:
        figures = f"{compared.error:>8.1e} {compared.bound:>7.1e}"
    line = f"{result.check.kernel:<24}{result.check.case:<32}{figures} {result.status}"
    if result.status == "failed":
        reason = " ".join(result.reason.split())
        line += f"\n    {reason if len(reason) <= 76 else reason[:73] + '...'}"
    return line


def facts_of(result: Result) -> dict[str, Any]:
    """A check as the file has it; the reason is whole there."""
    compared = result.comparison
    return {
        "kernel": result.check.kernel,
        "shape": result.check.shape,
        "body": "of CPU devices" if result.check.as_cpu else "of GPUs",
        "templates": result.templates,
        # JSON has no infinity, which stands for no number at all.
        "error": compared.error if compared and isfinite(compared.error) else None,
        "bound": compared.bound if compared else None,
        "status": result.status,
        "reason": result.reason,
        "seconds": round(result.seconds, 3),
    }


def device_facts(device: Device) -> dict[str, Any]:
    """Everything about the device and the software around it that a report needs."""
    import numpy

    import lora
    from lora.shaders.device import implementation

    return {
        "device": {key: str(value) for key, value in device.facts.info.items()},
        "features": sorted(device.found.features),
        "limits": dict(device.found.limits),
        "versions": {
            "webgpu-lora": lora.__version__,
            "wgpu": implementation().version,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
            "system": platform.platform(),
        },
    }


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Writes the file, whole or not at all.

    Raises:
        InputError: its folder can't be written to.
    """
    from lora.storage.files import write_file

    try:
        write_file(path, json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise InputError(
            f"--output {path}: it can't be written ({error.strerror}); name a file elsewhere."
        ) from error
