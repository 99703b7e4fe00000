"""The command `lora convert-config`; lora/commands/cli.py registers it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora.shaders.errors import InputError, plain

if TYPE_CHECKING:
    from lora.config.conversion.draft import Draft


def convert_command(
    file: Annotated[Path, typer.Argument(help="A YAML of Axolotl, LLaMA-Factory or mlx-lm.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Our config.")] = Path("lora.yaml"),
    force: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
) -> None:
    """Turn another tool's config into ours, and say what of it has no counterpart here."""
    from lora.config.schema import checked_config
    from lora.config.yaml_file import read_yaml_mapping
    from lora.storage.files import write_file

    if output.is_dir():
        raise InputError(f"--output: {output} is a directory; name a file, such as lora.yaml.")
    if output.exists() and not force:
        raise InputError(
            f"{output} is there already; --force replaces it, --output FILE writes another."
        )
    tool, draft = converted(read_yaml_mapping(file), file)
    text = draft.text(f"{tool}'s {file.name}")
    write_file(output, text)
    print(f"Wrote {plain(str(output))} from {tool}'s {plain(file.name)}.")
    _print("Look at:", draft.notes)
    _print("Not taken over:", [f"{key}: {why}" for key, why in draft.lacking.items()])
    if draft.needless:
        _print("Means nothing here:", [", ".join(draft.needless)])
    try:
        checked_config(draft.nested, str(output))
    except InputError as error:
        _print("Before it can run:", str(error).splitlines())
    print(f"Next:\n  {shlex.join(['lora', 'plan', str(output)])}")


def converted(values: dict[str, Any], file: Path) -> tuple[str, Draft]:
    """The tool's name and our config.

    Raises:
        InputError: the file is none of a tool that is known, or ours already.
    """
    from lora.config.conversion import axolotl, llama_factory, mlx_lm
    from lora.config.conversion.draft import Draft

    draft, keys = Draft(values), set(values)
    if "base_model" in keys:
        tool = "Axolotl"
        axolotl.convert(draft)
    elif "model_name_or_path" in keys:
        tool = "LLaMA-Factory"
        llama_factory.convert(draft, file.absolute().parent)
    elif isinstance(values.get("model"), str):
        tool = "mlx-lm"
        mlx_lm.convert(draft)
    else:
        ours = isinstance(values.get("model"), dict)
        raise InputError(
            f"{file}: "
            + (
                "is a config of ours already."
                if ours
                else "names no model as Axolotl (base_model), "
            )
            + ("" if ours else "LLaMA-Factory (model_name_or_path) or mlx-lm (model) do.")
        )
    draft.finish()
    return tool, draft


def _print(heading: str, lines: list[str]) -> None:
    if lines:
        print(heading)
        for line in lines:
            print(f"  {plain(line)}")
