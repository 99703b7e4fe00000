"""Arguments and options that several commands have."""

from __future__ import annotations

import shlex
from enum import StrEnum
from typing import Annotated

import typer

ConfigArgument = Annotated[str, typer.Argument(help="A YAML config.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the config; once for each."),
]
WebGPUOverride = Annotated[
    str | None,
    typer.Option("--webgpu", metavar="NAME", help="Override the config's: auto, wgpu or dawn."),
]
DeviceName = Annotated[str, typer.Option(help="auto, an index, or part of a name.")]


class TextPrecision(StrEnum):
    """Of the products of a prompt."""

    F32 = "f32"
    F16 = "f16"


PromptPrecision = Annotated[
    TextPrecision,
    typer.Option(
        "--precision",
        help="Of a prompt's products; f16 takes a GPU's matrix units, where there are some.",
    ),
]
WebGPUName = Annotated[
    str, typer.Option("--webgpu", metavar="NAME", help="The implementation: auto, wgpu or dawn.")
]


def key_of_option(error: BaseException) -> str:
    """Of an option that a command lacks, how the config's key of its name is set; or ""."""
    name, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    parameters = [] if context is None else context.command.params
    if not name or not any("--set" in parameter.opts for parameter in parameters):
        return ""
    from lora.config.errors import dotted_keys  # pydantic, which --help has no use for
    from lora.config.other_names import OTHER_NAMES
    from lora.config.schema import Config

    word = name.lstrip("-").replace("-", "_").lower()
    known = {key.rpartition(".")[2]: key for key in dotted_keys(Config)}
    key, _, value = (known.get(word) or OTHER_NAMES.get(word, "")).partition(": ")
    setting = shlex.quote(f"{key}={value or 'VALUE'}")
    return f"What a config has is set so: --set {setting}" if key else ""


def overrides(set_: list[str] | None, webgpu: str | None) -> list[str]:
    """What --set and --webgpu override, as `load_config` takes it; the second one wins."""
    return [*(set_ or []), *([] if webgpu is None else [f"webgpu={webgpu}"])]
