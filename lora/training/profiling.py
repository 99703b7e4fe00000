"""Where a step's time goes, kernel by kernel, against what the device can do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from rich import box
from rich.console import Console
from rich.table import Table

from lora.forward.attention import visible_pairs
from lora.forward.gather import gather_rows
from lora.forward.gguf.file import GGUFTensor
from lora.forward.matmul import matmul
from lora.forward.model.weights import load_matrix
from lora.forward.product import Product
from lora.shaders.device import Device
from lora.shaders.errors import InputError
from lora.shaders.program import Dispatch, Program
from lora.shaders.recording import Recording
from lora.training.session import TrainingSession


@dataclass(frozen=True)
class Peaks:
    """What a device reaches here: a large product, and a copy."""

    flops: float  # a second
    bytes_per_second: float  # read and written


@dataclass(frozen=True)
class KernelRow:
    """All dispatches of one kind in a step.

    Attributes:
        kernel: the template.
        label: what it does in the step.
        calls: dispatches.
        seconds: of GPU time together.
        flops: floating-point operations together; 0 where they don't matter.
        n_bytes: of all that is bound: what it may read and write at least once.
    """

    kernel: str
    label: str
    calls: int
    seconds: float
    flops: int
    n_bytes: int


def measure_peaks(device: Device) -> Peaks:
    """Times a product and a copy, the best of some runs after a warm-up."""
    with device.arena() as arena:
        return _measure_peaks(device.recording(memory=arena))


def _measure_peaks(recording: Recording) -> Peaks:
    n = 256 if recording.facts.is_cpu else 2048
    rng = np.random.default_rng(0)
    kind = GGMLQuantizationType.F32
    data = (rng.normal(size=(n, n)) / np.sqrt(n)).astype(np.float32).view(np.uint8)
    matrix = load_matrix(recording, [GGUFTensor("product", kind, (n, n), data)])
    extent = recording.memory.extent(n)
    x = recording.memory.empty((n, n), extent=extent)
    recording.memory.write(x, rng.normal(size=(n, n)))
    product = Program(recording)
    for _ in range(5):
        matmul(product, Product(x, matrix), out=recording.memory.scratch((n, n)))
    rows = (4 if recording.facts.is_cpu else 64) << 10
    many = recording.memory.extent(rows)
    source, copied = (recording.memory.empty((rows, 256), extent=many) for _ in range(2))
    order = recording.memory.upload(np.arange(rows, dtype=np.uint32))
    copy = Program(recording)
    for _ in range(5):
        gather_rows(copy, source, order, many, out=copied)
    return Peaks(
        flops=2 * n**3 * 5 / _best_seconds(product),
        bytes_per_second=2 * source.n_bytes * 5 / _best_seconds(copy),
    )


def _best_seconds(program: Program, repeats: int = 5) -> float:
    program.run()
    return min(sum(kernel.seconds for kernel in program.time()) for _ in range(repeats))


def kernel_table(
    session: TrainingSession, repeats: int = 5, lengths: Sequence[int] | None = None
) -> list[KernelRow]:
    """GPU time of one step with one micro-batch, by kernel, the most costly first.

    Whatever micro-batch was written last is run again; the adapter changes as in training.

    Args:
        lengths: of its examples, which say what attention computed; None for one example that
            fills it.

    Raises:
        InputError: the device has no timestamps.
    """
    facts = session.device.facts
    if "timestamp-query" not in facts.features:
        raise InputError(f"{facts.name} has no timestamps: kernels can't be timed on it.")
    best: dict[tuple[str, str], KernelRow] = {}
    for _ in range(repeats):
        found: dict[tuple[str, str], list[KernelRow]] = defaultdict(list)
        for program in session.step_programs():
            for dispatch, kernel in zip(program.dispatches, program.time(), strict=True):
                label = dispatch.label.split(".")[-1]
                n_bytes = sum(tensor.n_bytes for tensor in dispatch.tensors)
                found[dispatch.template, label].append(
                    KernelRow(
                        dispatch.template,
                        label,
                        1,
                        kernel.seconds,
                        _flops(dispatch, lengths),
                        n_bytes,
                    )
                )
        for key, rows in found.items():
            row = KernelRow(
                *key,
                calls=len(rows),
                seconds=sum(row.seconds for row in rows),
                flops=sum(row.flops for row in rows),
                n_bytes=sum(row.n_bytes for row in rows),
            )
            if key not in best or row.seconds < best[key].seconds:
                best[key] = row
    return sorted(best.values(), key=lambda row: -row.seconds)


def _flops(dispatch: Dispatch, lengths: Sequence[int] | None) -> int:
    """A dispatch's own count is of one example; attention's pairs are of each example."""
    if lengths is None or "window" not in dispatch.constants:
        return dispatch.flops
    window = dispatch.constants["window"]
    whole = visible_pairs(dispatch.tensors[1].shape[0], window)
    return dispatch.flops * sum(visible_pairs(n, window) for n in lengths) // whole


def kernel_facts(rows: list[KernelRow], peaks: Peaks) -> dict[str, Any]:
    """The table of `kernel_table` and the peaks as values that JSON can hold."""
    return {
        "seconds": sum(row.seconds for row in rows),
        "peaks": asdict(peaks),
        "kernels": [asdict(row) for row in rows],
    }


def print_kernels(console: Console, rows: list[KernelRow], peaks: Peaks) -> None:
    """The table of `kernel_table`, with what each reaches of the device's measured peaks."""
    total = sum(row.seconds for row in rows)
    table = Table(
        "kernel",
        title=f"{1e3 * total:.2f} ms of GPU time a step",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("calls", "ms", "share", "GFLOP/s", "peak", "GB/s", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        rate, speed = row.flops / row.seconds, row.n_bytes / row.seconds
        of_step = "" if row.label == row.kernel else f" {row.label}"
        table.add_row(
            f"{row.kernel}{of_step}",
            str(row.calls),
            f"{1e3 * row.seconds:.2f}",
            f"{row.seconds / total:.1%}",
            f"{rate / 1e9:,.0f}" if row.flops else "",
            f"{rate / peaks.flops:.0%}" if row.flops else "",
            f"{speed / 1e9:,.0f}",
            f"{speed / peaks.bytes_per_second:.0%}",
        )
    console.print(table)
    console.print(
        f"Measured peaks: {peaks.flops / 1e9:,.0f} GFLOP/s in a large product, "
        f"{peaks.bytes_per_second / 1e9:,.0f} GB/s in a copy. Bytes count all that is bound, once."
    )
