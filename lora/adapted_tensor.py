"""A PEFT adapter as changes of a base GGUF's tensors: rank, alpha and row order of each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forward.architecture import (
    HEAD,
    AdaptableMatrix,
    Architecture,
    permute_rows_to_gguf,
)
from lora.peft_files import SETTINGS, WEIGHTS, parse_peft_settings, read_peft_modules
from shaders.errors import InputError


@dataclass(frozen=True)
class AdaptedTensor:
    """What an adapter adds to one tensor of the base: scale · B · A.

    Attributes:
        name: of the tensor in the base GGUF, for example `blk.3.attn_q.weight`.
        a: f32 [rank, columns].
        b: f32 [rows, rank], rows in the GGUF's order.
        scale: alpha / rank, or alpha / sqrt(rank) of an rsLoRA adapter.
    """

    name: str
    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.a)

    def change(self, start: int, stop: int) -> np.ndarray:
        """What is added to rows start … stop, f32 [stop - start, columns]."""
        change: np.ndarray = (self.b[start:stop] * np.float32(self.scale)) @ self.a
        return change


def read_settings(directory: Path) -> dict[str, Any]:
    """The adapter_config.json of a LoRA or rsLoRA adapter, rank and alpha patterns included.

    Raises:
        InputError: DIR holds no adapter, or one that is no sum of scale · B · A.
    """
    settings, path = parse_peft_settings(directory), directory / SETTINGS
    try:
        patterns: dict[str, dict[str, float]] = {
            "rank_pattern": {k: int(v) for k, v in (settings.get("rank_pattern") or {}).items()},
            "alpha_pattern": {
                k: float(v) for k, v in (settings.get("alpha_pattern") or {}).items()
            },
        }
        for pattern in [*patterns["rank_pattern"], *patterns["alpha_pattern"]]:
            re.compile(pattern)
    except (ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        raise InputError(f"{path}: not the config of a LoRA adapter ({error!r}).") from None
    if settings.get("peft_type") != "LORA":
        raise InputError(
            f"{path}: peft_type is {settings.get('peft_type')!r}; only LoRA can be exported."
        )
    for key, what in (
        ("use_dora", "a DoRA adapter"),
        ("fan_in_fan_out", "an adapter of transposed matrices (fan_in_fan_out)"),
        ("modules_to_save", "an adapter with fully trained modules (modules_to_save)"),
    ):
        if settings.get(key):
            raise InputError(
                f"{path}: {what} can't be exported here; merge it with PEFT's merge_and_unload() "
                "and convert the model with llama.cpp's convert_hf_to_gguf.py."
            )
    return settings | patterns


def read_adapted_tensors(
    directory: Path, settings: Mapping[str, Any], architecture: Architecture
) -> dict[str, AdaptedTensor]:
    """All changes of an adapter by the tensor's name in the base.

    Args:
        settings: of `read_settings`.
        architecture: of the base.

    Raises:
        InputError: the weights can't be read, or do not fit the base.
    """
    places = {path: (matrix, name) for path, matrix, name in adaptable(architecture)}
    adapted = {}
    modules = read_peft_modules(directory)
    if not modules:
        raise InputError(f"{directory / WEIGHTS} is empty: the adapter changes nothing.")
    for path, (a, b) in modules.items():
        # Gemma 3 of 4B and up is a model of images too, with the language model one level down.
        place = places.get(path.replace("language_model.", ""))
        if place is None:
            raise InputError(
                f"{directory} adapts {path}, which the base (architecture {architecture.name!r}, "
                f"{architecture.n_layers} layers) does not have; name the right one with --base."
            )
        matrix, name = place
        rank = _of_pattern(settings["rank_pattern"], path, settings["r"])
        expected = (rank, matrix.in_size(architecture)), (matrix.out_size(architecture), rank)
        if (a.shape, b.shape) != expected:
            raise InputError(
                f"{directory}: {path} has A {a.shape} and B {b.shape}; this base and rank {rank} "
                f"want {expected[0]} and {expected[1]}. Name the right base with --base."
            )
        alpha = _of_pattern(settings["alpha_pattern"], path, settings["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        heads = matrix.permuted_heads(architecture)
        rows = b if heads is None else permute_rows_to_gguf(b, heads)
        adapted[name] = AdaptedTensor(name, a, np.ascontiguousarray(rows), scale)
    return adapted


def adaptable(architecture: Architecture) -> Iterator[tuple[str, AdaptableMatrix, str]]:
    """(PEFT's module path, matrix, name of the GGUF's tensor) of all that LoRA can adapt."""
    for matrix in architecture.matrices.values():
        if matrix is not HEAD:
            for layer in range(architecture.n_layers):
                yield matrix.peft_path(layer), matrix, matrix.tensor_name(layer)
    yield HEAD.module, HEAD, "output.weight"


def _of_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value that PEFT takes for a module: of the first pattern that its path ends with."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default
