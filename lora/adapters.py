"""Adapters as they come: a PEFT directory, or a GGUF adapter of llama.cpp's and Ollama's kind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from forward.adapter import AdapterLayout
from forward.architecture import MODULE_NAMES, Architecture
from lora.gguf_adapter import load_gguf_adapter, read_adapter_settings
from lora.peft_files import load_peft_adapter, read_peft_modules, read_peft_settings
from shaders.errors import InputError


@dataclass(frozen=True)
class SavedAdapter:
    """What an adapter on disk is, before its numbers are put anywhere.

    Attributes:
        path: a directory, or a .gguf file.
        rank: of all its matrices.
        scale: what B · A is multiplied by.
        made_with: its settings in the config's terms, for messages.
        modules: PEFT paths of the matrices that it adapts.
    """

    path: Path
    rank: int
    scale: float
    made_with: str
    modules: tuple[str, ...]

    @property
    def targets(self) -> list[str]:
        """PEFT's names of its matrices."""
        return sorted({path.rpartition(".")[2] for path in self.modules})

    @property
    def layers(self) -> list[int]:
        """The numbers of the layers that it adapts; none where it adapts the head only."""
        numbered = (path.split(".layers.")[1] for path in self.modules if ".layers." in path)
        return sorted({int(rest.split(".")[0]) for rest in numbered})

    def layout(self, architecture: Architecture) -> AdapterLayout:
        """The layout that holds just what it adapts.

        Raises:
            InputError: it was made for another model.
        """
        unknown = [name for name in self.targets if name not in MODULE_NAMES]
        if unknown or not self.targets:
            raise InputError(
                f"{self.path}: adapts {', '.join(unknown) or 'nothing'}; not supported."
            )
        missing = [name for name in self.targets if name not in architecture.matrices]
        if missing:
            raise InputError(
                f"{self.path}: adapts {', '.join(missing)}, which a model of the architecture "
                f"{architecture.name!r} does not have; it has {', '.join(architecture.matrices)}."
            )
        if self.layers and self.layers[-1] >= architecture.n_layers:
            raise InputError(
                f"{self.path}: adapts layer {self.layers[-1]}, but the model has "
                f"{architecture.n_layers} layers; the adapter was made for another model."
            )
        return AdapterLayout(architecture, self.layers, self.targets, self.rank, self.scale)


def is_gguf_adapter(path: Path) -> bool:
    """Whether a path names a GGUF adapter rather than a PEFT directory."""
    return path.suffix == ".gguf" and not path.is_dir()


def open_adapter(path: Path, architecture: Architecture) -> SavedAdapter:
    """Reads what an adapter is.

    Raises:
        InputError: it is no adapter, or one for another architecture.
    """
    if is_gguf_adapter(path):
        found = read_adapter_settings(path)
        made_with = f"rank {found.rank} and alpha {found.alpha:g}"
        modules = found.modules(architecture)
        return SavedAdapter(path, found.rank, found.alpha / found.rank, made_with, tuple(modules))
    settings = read_peft_settings(path)
    rank, alpha = settings["r"], settings["lora_alpha"]
    stabilized = bool(settings.get("use_rslora"))
    variant = "rslora" if stabilized else "lora"
    return SavedAdapter(
        path,
        rank,
        alpha / (rank**0.5 if stabilized else rank),
        f"rank {rank}, alpha {alpha:g} and variant {variant}",
        tuple(read_peft_modules(path)),
    )


def load_adapter(path: Path, layout: AdapterLayout) -> np.ndarray:
    """An adapter in the layout of the device, f32 [layout.size].

    Where its scale is another one than the layout's, B takes up the difference: the product is
    the one that was trained.

    Raises:
        InputError: it adapts other matrices than the layout, or with other sizes.
    """
    if is_gguf_adapter(path):
        return load_gguf_adapter(path, layout)
    flat = load_peft_adapter(path, layout)
    factor = open_adapter(path, layout.architecture).scale / layout.scale
    if math.isclose(factor, 1.0, rel_tol=1e-6):
        return flat
    modules = layout.to_modules(flat)
    return layout.from_modules(
        {name: (a, b * np.float32(factor)) for name, (a, b) in modules.items()}
    )
