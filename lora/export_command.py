"""The command `lora export`; lora/cli.py registers it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from gguf import GGMLQuantizationType
from rich.console import Console
from rich.progress import Progress

from lora.export import ADAPTER, MERGED, Export, export
from lora.merge import MergedTensor

_ENOUGH_KEPT = 0.8  # of the change; with less the file is no longer the model that was trained


def export_command(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A PEFT adapter directory, such as a run's.")
    ],
    to: Annotated[str, typer.Option(help="gguf (the adapter) or merged-gguf (base and adapter).")],
    output: Annotated[
        Path | None, typer.Option(help="The file to write. Default: DIR/adapter.gguf, merged.gguf.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Default: the one that the adapter names.")
    ] = None,
    type_: Annotated[
        str | None,
        typer.Option("--type", help="Tensor type. Default: F32 (gguf), the base's (merged-gguf)."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace files that are there.")] = False,
) -> None:
    """Write an adapter for llama.cpp and Ollama, or merge it into its base."""
    console = Console(stderr=True)
    # Without a terminal a transient bar would leave an empty line behind.
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("merging" if to == MERGED else "writing", total=None)
        done = export(
            directory,
            to,
            output=output,
            base=base,
            kind=type_,
            force=force,
            on_tensor=lambda tensor: progress.update(task, description=f"merged {tensor.name}"),
        )
    for line in describe(done):
        print(line)


def describe(done: Export) -> list[str]:
    """What an export wrote, what merging lost, and how to run it."""
    n_bytes = done.path.stat().st_size
    lines = [f"Wrote {done.path} ({n_bytes / 1e6:,.1f} MB, {done.n_tensors} adapted tensors)."]
    if done.merged:
        mean_error = fmean(tensor.error for tensor in done.merged)
        worst = max(done.merged, key=lambda tensor: tensor.error)
        mean_change = fmean(tensor.change for tensor in done.merged)
        kinds = Counter(tensor.kind.name for tensor in done.merged).most_common()
        lines = [
            *_warning(done.merged),
            *lines,
            f"Types of the merged tensors: {', '.join(f'{n} {name}' for name, n in kinds)}.",
            f"Rounding to them differs from the exact sum by {mean_error:.3%} on average, "
            f"{worst.error:.3%} at worst ({worst.name}, {worst.kind.name});",
            f"the adapter itself changed the tensors by {mean_change:.3%} on average; "
            f"{_mean_kept(done.merged):.1%} of what the adapter changed is kept.",
            f"llama.cpp: llama-cli -m {done.path}",
        ]
    else:
        lines.append(f"llama.cpp: llama-cli -m {done.base_path} --lora {done.path}")
    return [*lines, f"Ollama: ollama create NAME -f {done.modelfile}"]


def _mean_kept(merged: list[MergedTensor]) -> float:
    """`kept` on average over the tensors that the adapter changes at all."""
    return fmean([tensor.kept for tensor in merged if tensor.change] or [1.0])


def _warning(merged: list[MergedTensor]) -> list[str]:
    """What to know and to do first where rounding dropped the adapter; else no lines."""
    kept = _mean_kept(merged)
    if kept >= _ENOUGH_KEPT:
        return []
    dropping = {tensor.kind for tensor in merged if tensor.kept < _ENOUGH_KEPT}
    names = ", ".join(sorted(kind.name for kind in dropping))
    behaves = "mostly like the base" if kept < 0.5 else "only in part as it was trained"
    return [
        f"Warning: the merged file behaves {behaves}: {kept:.1%} of what the adapter changed is "
        f"kept, the rest was lost in rounding to {names}.",
        f"Export with --type {_finer(dropping).name} and --force, or leave the adapter a file of "
        f"its own with --to {ADAPTER}.",
    ]


def _finer(dropping: set[GGMLQuantizationType]) -> GGMLQuantizationType:
    """The smallest type with steps finer than those of every given one."""
    if dropping & {GGMLQuantizationType.F16, GGMLQuantizationType.BF16}:
        return GGMLQuantizationType.F32
    if GGMLQuantizationType.Q8_0 in dropping:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType.Q8_0
