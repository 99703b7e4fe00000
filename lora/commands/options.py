"""Arguments and options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

ConfigArgument = Annotated[str, typer.Argument(help="A YAML config.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the config."),
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


def overrides(set_: list[str] | None, webgpu: str | None) -> list[str]:
    """What --set and --webgpu override, as `load_config` takes it; the second one wins."""
    return [*(set_ or []), *([] if webgpu is None else [f"webgpu={webgpu}"])]
