"""The command `lora export`; lora/commands/cli.py registers it."""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

if TYPE_CHECKING:  # imported in the functions: `lora --help` has no use for them
    from gguf import GGMLQuantizationType

    from lora.adapters.origin import PromptForm
    from lora.export.merge import MergedTensor
    from lora.export.to_gguf import Export

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
    from lora.export.to_gguf import MERGED, export

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
        print(line, flush=True)  # before what goes to stderr
    for line in loss_warning(done, directory, output=output, base=base):
        print(line, file=sys.stderr)


def describe(done: Export) -> list[str]:
    """What an export wrote, what merging lost, and how to run it."""
    n_bytes = done.path.stat().st_size
    lines = [f"Wrote {done.path} ({n_bytes / 1e6:,.1f} MB, {done.n_tensors} adapted tensors)."]
    gguf, kept = shlex.quote(str(done.path)), _mean_kept(done.merged)
    model = f"-m {gguf}"
    if done.merged:
        mean_error = fmean(tensor.error for tensor in done.merged)
        worst = max(done.merged, key=lambda tensor: tensor.error)
        mean_change = fmean(tensor.change for tensor in done.merged)
        kinds = Counter(tensor.kind.name for tensor in done.merged).most_common()
        lines += [
            f"Types of the merged tensors: {', '.join(f'{n} {name}' for name, n in kinds)}.",
            f"Rounding to them differs from the exact sum by {mean_error:.3%} on average, "
            f"{worst.error:.3%} at worst ({worst.name}, {worst.kind.name});",
            f"the adapter itself changed the tensors by {mean_change:.3%} on average; "
            f"{kept:.1%} of what the adapter changed is kept.",
        ]
    else:
        model = f"-m {shlex.quote(str(done.base_path))} --lora {gguf}"
    if done.template is not None:
        lines += _how_to_chat(done)
    if done.prompts is None:
        llama_cpp = f"llama-cli {model}{_template_options(done)}"
    else:
        lines += _how_to_prompt(done.prompts)
        # llama-cli only chats. llama.cpp reads \n in -p as a line break.
        ending = done.prompts.ending.encode("unicode_escape").decode()
        llama_cpp = f"llama-completion -no-cnv {model} -p {shlex.quote(f'PROMPT{ending}')}"
    part = "" if kept >= _ENOUGH_KEPT else f", with {kept:.1%} of the adapter"
    return [
        *lines,
        f"llama.cpp{part}: {llama_cpp}",
        f"Ollama{part}: ollama create NAME -f {shlex.quote(str(done.modelfile))}",
    ]


def _template_options(done: Export) -> str:
    """What llama.cpp must be told to write chats as in training."""
    options = []
    if done.template is not None and not done.merged:
        options += ["--chat-template-file", str(done.template)]
    if done.template_arguments:
        options += ["--chat-template-kwargs", json.dumps(dict(done.template_arguments))]
    if options or done.template is not None:
        options.insert(0, "--jinja")
    return "".join(f" {shlex.quote(option)}" for option in options)


def _how_to_chat(done: Export) -> list[str]:
    """What the model's chats are written with, where that isn't the base's template."""
    where = "which the merged file holds" if done.merged else f"which is {done.template}"
    return [
        f"The adapter was trained with a chat template of its own (data.chat_template), {where}.",
        f"Ollama takes templates in Go alone: write its form as TEMPLATE into {done.modelfile}.",
    ]


def _how_to_prompt(prompts: PromptForm) -> list[str]:
    """What the model wants to see where no chat template stands around it."""
    written = {
        "completion": "A prompt is written as in the training data, to its last character",
        "instruct": "A prompt is the instruction, after an empty line the input if there is one",
        "text": "A prompt is the beginning of a text like those of the training data",
    }[prompts.data_format]
    if prompts.ending:
        shown = prompts.ending.encode("unicode_escape").decode()
        written += f', and "{shown}" must end it: in Ollama leave that out, the Modelfile adds it'
    return [
        f"The adapter was trained without a chat template (data.format {prompts.data_format}), "
        "and the commands below put none around a prompt.",
        f"{written}.",
    ]


def loss_warning(
    done: Export, directory: Path, *, output: Path | None, base: str | None
) -> list[str]:
    """What to know and to do last, where rounding dropped the adapter; else no lines.

    Args:
        done: the export.
        directory, output, base: as they were given for it.
    """
    from lora.export.to_gguf import MERGED

    kept = _mean_kept(done.merged)
    if kept >= _ENOUGH_KEPT:
        return []
    dropping = {tensor.kind for tensor in done.merged if tensor.kept < _ENOUGH_KEPT}
    names = ", ".join(sorted(kind.name for kind in dropping))
    behaves = "hardly" if kept < 0.5 else "only in part"
    again = ["lora", "export", str(directory), "--to", MERGED]
    again += [] if output is None else ["--output", str(output)]
    again += [] if base is None else ["--base", base]
    again += ["--type", _finer(dropping).name, "--force"]
    return [
        f"Warning: {done.path} behaves {behaves} like the tuned model: {1 - kept:.1%} of what the "
        f"adapter changed was lost in rounding to {names}.",
        "A type of finer steps keeps more of it; export again with",
        f"  {shlex.join(again)}",
    ]


def _mean_kept(merged: list[MergedTensor]) -> float:
    """`kept` on average over the tensors that the adapter changes at all."""
    return fmean([tensor.kept for tensor in merged if tensor.change] or [1.0])


def _finer(dropping: set[GGMLQuantizationType]) -> GGMLQuantizationType:
    """The smallest type with steps finer than those of every given one."""
    from gguf import GGMLQuantizationType

    from lora.forward.gguf.quantization import QUANTIZATIONS

    bits = max(QUANTIZATIONS[kind].bits_a_weight for kind in dropping)
    for finer in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16):
        if QUANTIZATIONS[finer].bits_a_weight > bits:
            return finer
    return GGMLQuantizationType.F32
