"""The command `lora init`; lora/commands/cli.py registers it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from lora.shaders.errors import InputError

# Shows every key with its default (tests/lora/data/test_commands_data.py holds it to that).
_EXAMPLE = Path(__file__).parents[1] / "configs" / "smollm2-chat.yaml"
_MAGIC = b"GGUF"  # with which a model's file begins
_HEADING = """\
# Written by `lora init`: every key there is, with its default.
# Paths are relative to the folder where `lora` runs.
"""
# The keys without a default are marked in the example: `  path: VALUE   # (*) what is allowed`.
_WITHOUT_DEFAULT = re.compile(r"^( *)(path|train|output): \S+( +# )\(\*\) ", re.MULTILINE)


def init_command(
    model: Annotated[
        str | None, typer.Option(help="A GGUF file, ollama:NAME[:TAG] or hf:ORG/REPO[:QUANT].")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A file, a directory, or the name of a Hugging Face data set."),
    ] = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="The config.")] = Path("lora.yaml"),
    force: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
) -> None:
    """Write a config for a model and a data file, with every key explained."""
    from lora.storage.files import write_file

    if not model or not data:
        raise InputError(
            "init needs the base model and the examples, such as: "
            "lora init --model models/MODEL.gguf --data data/train.jsonl"
        )
    _check_model(model)
    found = _describe_rows(data)
    if output.is_dir():
        raise InputError(f"--output: {output} is a directory; name a file, such as lora.yaml.")
    if output.exists() and not force:
        raise InputError(
            f"{output} is there already; --force replaces it, --output FILE writes another."
        )
    write_file(output, config_text(model, data, f"runs/{output.stem}"))
    print(f"Wrote {output}{found}. Next:")
    for command in ("data", "plan", "train"):
        print(f"  {shlex.join(['lora', command, str(output)])}")


def config_text(model: str, data: str, output: str) -> str:
    """A whole config as YAML with comments.

    Args:
        model: `model.path`.
        data: `data.train`.
        output: `output`, the directory that the run writes to.

    Raises:
        InputError: one of them can't be written as text.
    """
    values = {"path": model, "train": data, "output": output}

    def filled(match: re.Match[str]) -> str:
        indent, key, before_comment = match.groups()
        return f"{indent}{key}: {_yaml_text(values[key])}{before_comment}"

    example = _EXAMPLE.read_text(encoding="utf-8")
    keys = example[example.index("model:") :]
    return _HEADING + _WITHOUT_DEFAULT.sub(filled, keys)


def _yaml_text(value: str) -> str:
    """A text as YAML reads it back: as it is, or in quotes where YAML would see something else."""
    from lora.config.yaml_file import parse_yaml

    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{value!r} is not UTF-8; rename the file.") from None
    try:
        is_plain = parse_yaml(f"key: {value} # comment", "init") == {"key": value}
    except InputError:
        is_plain = False
    return value if is_plain else json.dumps(value)


def _check_model(model: str) -> None:
    """Refuses a name of the wrong form, or of a file that isn't there; fetches nothing.

    Raises:
        InputError: it is one of these.
    """
    from lora.storage.stores import check_model_name, hub_hint, is_path, resolve_model

    check_model_name(model)
    if not is_path(model):
        return
    path = resolve_model(model)  # refuses safetensors
    if not path.is_file():
        found = hub_hint(model) or "; `lora pull` fetches known small models"
        raise InputError(f"--model: {model}: there is no such file{found}.")
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise InputError(f"--model: {model} is no GGUF file.")


def _describe_rows(data: str) -> str:
    """How many rows a file has, and of which format; a data set is not fetched for that.

    Raises:
        InputError: the file is missing or a row is wrong.
    """
    from lora.config.data_section import SourceConfig
    from lora.data.opened import checked_records
    from lora.data.sources import is_file_name, open_source

    if not is_file_name(data):
        return f" for the Hugging Face data set {data}"  # says what a mistyped path is taken for
    data_format, n_rows = checked_records(open_source(SourceConfig(path=data), "train"))
    return f" for {n_rows} rows of the format {data_format}"
