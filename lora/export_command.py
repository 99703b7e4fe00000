"""The command `lora export`; lora/cli.py registers it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from lora.export import MERGED, Export, export


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
    with Progress(console=Console(stderr=True), transient=True) as progress:
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
        mean_error = sum(tensor.error for tensor in done.merged) / len(done.merged)
        worst = max(done.merged, key=lambda tensor: tensor.error)
        mean_change = sum(tensor.change for tensor in done.merged) / len(done.merged)
        kinds = Counter(tensor.kind.name for tensor in done.merged).most_common()
        lines += [
            f"Types of the merged tensors: {', '.join(f'{n} {name}' for name, n in kinds)}.",
            f"Rounding to them differs from the exact sum by {mean_error:.3%} on average, "
            f"{worst.error:.3%} at worst ({worst.name}, {worst.kind.name});",
            f"the adapter itself changed the tensors by {mean_change:.3%} on average"
            f"{'; --type Q8_0 loses less.' if mean_error > 0.2 * mean_change else '.'}",
            f"llama.cpp: llama-cli -m {done.path}",
        ]
    else:
        lines.append(f"llama.cpp: llama-cli -m {done.base_path} --lora {done.path}")
    return [*lines, f"Ollama: ollama create NAME -f {done.modelfile}"]
