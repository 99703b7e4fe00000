"""The command `lora devices`; lora/commands/cli.py registers it."""

from __future__ import annotations

import json
from collections import Counter
from math import isfinite
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora.shaders.errors import InputError

if TYPE_CHECKING:  # imported where they are used: --help is quick
    from lora.checks.suite import Result
    from lora.shaders.device import Device
    from lora.shaders.webgpu import Found

_REPORT = Path("lora-check.json")
_COLUMNS = 80
_FEATURES = ("shader-f16", "subgroups", "timestamp-query")  # of use here


def devices_command(
    check: Annotated[
        bool, typer.Option("--check", help="Run every kernel against its reference on one.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="For --check: auto, an index, or part of a name.")
    ] = "auto",
    webgpu: Annotated[
        str, typer.Option(help="For --check: auto, wgpu or dawn, the implementation.")
    ] = "auto",
    output: Annotated[
        Path, typer.Option(help="For --check: the file to attach to a report.")
    ] = _REPORT,
) -> None:
    """The devices that wgpu-native and Dawn see; with --check, whether one computes what it should.

    The check runs every kernel on small shapes against numpy in float64. A minute or two; exit
    status 1 where one failed. The file it writes says all that a report needs.
    """
    if check:
        if not run_check(device, output, webgpu):
            raise typer.Exit(1)
        return
    if (device, webgpu, output) != ("auto", "auto", _REPORT):
        raise InputError(
            "--device, --webgpu and --output belong to --check: add it, or leave them out."
        )
    for line in listing():
        print(line)


def listing() -> list[str]:
    """What both implementations see, and what `auto` takes, in lines of 80 columns.

    Raises:
        InputError: neither sees a device.
    """
    from lora.shaders.choice import UnavailableError, asked_for, choose, list_devices

    lines: list[str] = []
    found: dict[str, list[Found]] = {}
    for setting, name in (("wgpu", "wgpu-native"), ("dawn", "Dawn")):
        lines.append(f"{name} (webgpu: {setting})")
        found[setting] = []
        try:
            found[setting] = list_devices(setting)
        except UnavailableError as reason:
            lines += _wrapped(f"{reason}.", "  ")
            continue
        if not found[setting]:
            lines.append("  no device")
        for index, one in enumerate(found[setting]):
            lines += device_lines(index, one)
    asked = asked_for()
    chosen = choose(asked, "auto", found["wgpu"], found["dawn"]).found
    maker = chosen.implementation
    by = "webgpu: auto" if asked == "auto" else f"LORA_WEBGPU={asked}"
    taken = f"{by} takes {chosen.info['device']} through {maker.name} "
    return [*lines, "", *_wrapped(f"{taken}({maker.package} {maker.version}).", "")]


def device_lines(index: int, found: Found) -> list[str]:
    """A device as the listing has it."""
    from lora.shaders.facts import usable_shapes

    info, limits = found.info, found.limits
    features = [name for name in _FEATURES if name in found.features]
    usable = usable_shapes(found.matrix_shapes)
    others = [shape for shape in found.matrix_shapes if shape not in usable]
    rows = {
        "kind": f"{info['adapter_type']}, {info['backend_type']}",
        "driver": info["description"] or "not told",
        "limits": f"buffer {_size(limits['max-buffer-size'])}, "
        f"binding {_size(limits['max-storage-buffer-binding-size'])}, "
        f"workgroup {_size(limits['max-compute-workgroup-storage-size'])} and "
        f"{limits['max-compute-invocations-per-workgroup']} lanes, "
        f"{limits['max-storage-buffers-per-shader-stage']} buffers a kernel",
        "features": ", ".join(features) or "none of use here",
        "matrix units": ", ".join(map(str, usable)) or "none that kernels here can use",
    }
    if found.subgroup_lanes is not None:
        least, most = found.subgroup_lanes
        rows["features"] += f"; subgroups of {least if least == most else f'{least} to {most}'}"
    if others:
        rows["matrix units"] += f" (others: {', '.join(map(str, others))})"
    lines = _wrapped(f"{index}  {info['device']}", "  ", "     ")
    for name, value in rows.items():
        lines += _wrapped(f"{name + ':':<14}{value}", "     ", " " * 19)
    return lines


def _wrapped(text: str, indent: str, further: str | None = None) -> list[str]:
    """A text in lines of 80 columns."""
    return fill(
        text, _COLUMNS, initial_indent=indent,
        subsequent_indent=indent if further is None else further,
    ).splitlines()  # fmt: skip


def _size(n_bytes: int) -> str:
    """Bytes in the unit that leaves few digits."""
    for unit, name in ((40, "TiB"), (30, "GiB"), (20, "MiB")):
        if n_bytes >= 1 << unit:
            return f"{n_bytes / (1 << unit):.4g} {name}"
    return f"{n_bytes / 1024:.4g} KiB"


def run_check(wanted: str, output: Path, webgpu: str = "auto") -> bool:
    """Checks a device, prints a table of 80 columns and writes the file; whether all passed.

    The file is written anew after each check and names the next one: a driver that ends the
    process leaves it behind.

    Raises:
        InputError: there is no such device, or the file can't be written.
    """
    from lora.checks.suite import ALL_CHECKS, run_checks
    from lora.shaders.device import Device

    first = [Device(wanted, webgpu=webgpu)]  # a wrong name is the user's error
    report = {**device_facts(first[0]), "finished": False, "checks": []}
    print(f"{report['device']['device']}, {report['device']['description']}")
    print(f"{'kernel':<24}{'shape':<32}{'error':>8} {'bound':>7} result")
    counts: Counter[str] = Counter()
    names = [f"{c.kernel} {c.case}" for c in ALL_CHECKS]
    write_report(output, {**report, "running": names[0]})

    def open_device() -> Device:
        return first.pop() if first else Device(wanted, webgpu=webgpu)

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
    from lora.training.provenance import versions

    return {
        "device": {key: str(value) for key, value in device.facts.info.items()},
        "features": sorted(device.found.features),
        "limits": dict(device.found.limits),
        "matrix_shapes": [vars(shape) for shape in device.found.matrix_shapes],
        "versions": versions(device),
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
