"""Adapters as they come: a PEFT directory, or a GGUF adapter of llama.cpp's and Ollama's kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from lora.adapters.fused_names import as_named_in
from lora.adapters.gguf_files import load_gguf_adapter, read_adapter_settings
from lora.adapters.peft_files import (
    load_peft_adapter,
    read_peft_factors,
    read_peft_settings,
)
from lora.adapters.peft_settings import TOKENS
from lora.adapters.saved_factors import common_scale
from lora.forward.gguf.file import GGUFFile
from lora.forward.model.adaptable import EMBEDDING, MODULE_NAMES
from lora.forward.model.adapter import AdapterLayout
from lora.forward.model.architecture import Architecture
from lora.forward.model.low_rank import Beside, LowRank
from lora.shaders.errors import InputError
from lora.storage.stores import resolve_model

if TYPE_CHECKING:
    from lora.config.schema import AdapterConfig, Config


@dataclass(frozen=True)
class SavedAdapter:
    """What an adapter on disk is, before its numbers are put anywhere.

    Attributes:
        path: a directory, or a .gguf file.
        rank: the highest of its matrices.
        scale: what most of its products B · A are multiplied by, without a sign; on the device
            it is that of all, see `saved_factors.pack`.
        stabilized: whether its scales are meant as alpha / sqrt(rank).
        low: what each of its matrices is adapted with, by PEFT's path.
        dora: whether it has DoRA's magnitudes.
        tokens: ids whose rows of the embedding it has.
    """

    path: Path
    rank: int
    scale: float
    stabilized: bool
    low: Mapping[str, LowRank]
    dora: bool = False
    tokens: tuple[int, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """PEFT paths of the matrices that it adapts."""
        return tuple(self.low)

    @property
    def alpha(self) -> float:
        """What the config calls alpha at this rank and scale."""
        stabilized = self.stabilized and not self.dora  # the config has one word for both
        return self.scale * (self.rank**0.5 if stabilized else self.rank)

    @property
    def variant(self) -> Literal["lora", "rslora", "dora"]:
        """What the config calls the variant."""
        if self.dora:
            return "dora"
        return "rslora" if self.stabilized else "lora"

    @property
    def made_with(self) -> str:
        """Its settings in the config's terms, for messages."""
        return f"rank {self.rank}, alpha {self.alpha:g} and variant {self.variant}"

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
        known = {*architecture.matrices, EMBEDDING.module}
        missing = [name for name in self.targets if name not in known]
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
        if max(self.tokens, default=0) >= architecture.vocab_size:
            raise InputError(
                f"{self.path}: has a row of the token {max(self.tokens)}, but the model's "
                f"embedding has {architecture.vocab_size}; the adapter was made for another model."
            )
        # Just its own matrices: not each layer need have all that another has.
        low = LowRank(self.rank, self.scale)
        beside = Beside(self.dora, self.tokens)
        given = (architecture, self.layers, self.targets, self.rank, self.scale)
        every = AdapterLayout(*given, beside=beside)
        modules = {path: low for path in every.low_ranks() if path in set(self.modules)}
        if len(modules) == len(every.low_ranks()):
            return every
        return AdapterLayout(*given, modules, beside=beside)

    def settings(self, architecture: Architecture) -> AdapterConfig:
        """The config's section with which a session takes it over as it is.

        Raises:
            InputError: it was made for another model.
        """
        from lora.config.schema import AdapterConfig  # pydantic, for evaluations only

        layout = self.layout(architecture)
        return AdapterConfig(
            rank=self.rank,
            alpha=self.alpha,
            variant=self.variant,
            targets=sorted(layout.low_ranks()) if layout.is_partial else self.targets,
            layers=layout.layers or "all",  # lm_head alone is in no layer
            trainable_tokens=list(self.tokens),
            init_from=str(self.path),
        )


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
        scale = common_scale(found.scale(tensor) for tensor in found.ranks)
        low = {
            module: LowRank(found.ranks[tensor], found.scale(tensor))
            for module, tensor in found.modules(architecture).items()
        }
        return SavedAdapter(path, found.rank, scale, False, low)
    settings = read_peft_settings(path)
    modules = as_named_in(architecture, path, read_peft_factors(path, settings))
    return SavedAdapter(
        path,
        max((factors.rank for factors in modules.values()), default=settings["r"]),
        common_scale(factors.scale for factors in modules.values()),
        bool(settings.get("use_rslora")),
        {module: LowRank(factors.rank, factors.scale) for module, factors in modules.items()},
        settings["use_dora"],
        tuple(settings[TOKENS]),
    )


def load_adapter(path: Path, layout: AdapterLayout) -> np.ndarray:
    """An adapter in the layout of the device, f32 [layout.size].

    Ranks and scales may differ from matrix to matrix; see `saved_factors.pack`.

    Raises:
        InputError: it adapts other matrices than the layout, or with other sizes.
    """
    load = load_gguf_adapter if is_gguf_adapter(path) else load_peft_adapter
    return load(path, layout)


def with_adapter(config: Config, path: Path) -> Config:
    """A config with an adapter's own rank, scale, matrices and layers, and begun from it.

    Raises:
        InputError: it is no adapter, or one for another model than the config's.
    """
    architecture = Architecture.from_gguf(GGUFFile(resolve_model(config.model.path)))
    settings = open_adapter(path, architecture).settings(architecture)
    return config.model_copy(update={"adapter": settings})
