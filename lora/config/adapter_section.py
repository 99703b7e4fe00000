"""`adapter:`, what is trained, in PEFT's words and with its matching."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from lora.config.errors import did_you_mean
from lora.config.fields import Count, Number, PathText, Section
from lora.forward.model.adaptable import EMBEDDING, EMBEDDING_PATH, HEAD, MODULE_NAMES
from lora.forward.model.architecture import Architecture
from lora.forward.model.low_rank import LowRank
from lora.shaders.errors import InputError
from lora.shaders.untrusted import MOST_RANK

Rank = Annotated[int, Field(ge=1, le=MOST_RANK)]
_ALPHA = Annotated[Number, Field(gt=0)]
# A name of a module, alone or with what holds it: q_proj, self_attn.q_proj, layers.3.mlp.up_proj.
_NAME = re.compile(r"\w+(\.\w+)*")
_RANGE = re.compile(r"(\d{1,6})\s*-\s*(\d{1,6})")
_CHANGES_THE_BASE = (
    "it takes a part out of the base's weights for the adapter to begin with, and the rest would "
    "have to be written back into the base: a quantized file can't hold it, and the adapter would "
    "fit no other copy of the base; allowed here: default or gaussian."
)
_NAMED_TARGETS = ", ".join(MODULE_NAMES)


class LastLayers(Section):
    """`{last: N}`: the N layers nearest to the head."""

    last: Count


def _layer_range(value: object) -> object:
    """A range `4-7` as its numbers, both ends included; everything else as it is."""
    found = _RANGE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return value
    first, last = (int(number) for number in found.groups())
    if last < first:
        raise ValueError(f"got {value!r}; a range begins with its lower number, as 4-7.")
    return list(range(first, last + 1))


def _layer_numbers(value: object) -> object:
    """A range, or a list of layers with ranges among them, as numbers."""
    if not isinstance(value, list):
        return _layer_range(value)
    numbers: list[object] = []
    for one in value:
        of_range = _layer_range(one)
        numbers += of_range if isinstance(of_range, list) else [of_range]
    return numbers


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"got {pattern!r}, which is no regular expression ({error}).") from None


def _check_name(name: str, allowed: str) -> None:
    """Refuses a name whose last part no model has."""
    if _NAME.fullmatch(name) is None or name.rpartition(".")[2] not in MODULE_NAMES:
        suggestion = did_you_mean(name.rpartition(".")[2], list(MODULE_NAMES))
        raise ValueError(f"got {name!r}{suggestion or '; ' + allowed}")


class AdapterConfig(Section):
    """`adapter:`, what is trained."""

    rank: int = Field(default=16, ge=1, le=MOST_RANK, description="a whole number of at least 1")
    alpha: Number = Field(default=32.0, gt=0, description="a number above 0")
    dropout: Number = Field(default=0.0, ge=0, lt=1, description="a number from 0 to below 1")
    targets: str | list[str] = Field(
        default="all-linear",
        description=f"all-linear, or a list of {_NAMED_TARGETS}, one of these, or a regular "
        "expression for whole paths such as model.layers.0.self_attn.q_proj",
    )
    exclude: str | list[str] = Field(
        default=[],
        description="a list of names as in targets, or a regular expression for whole paths",
    )
    layers: Annotated[
        Literal["all"] | LastLayers | list[Annotated[int, Field(ge=0)]],
        BeforeValidator(_layer_numbers),
    ] = Field(
        default="all",
        description="all, {last: N} with N at least 1, a range such as 4-7, or a list of layer "
        "numbers (the first is 0) and ranges",
    )
    rank_pattern: dict[str, Rank] = Field(
        default={},
        description="ranks of at least 1 by name or regular expression, {down_proj: 32}",
    )
    alpha_pattern: dict[str, _ALPHA] = Field(
        default={},
        description="alphas above 0 by name or regular expression, {down_proj: 64}",
    )
    trainable_tokens: list[Annotated[int, Field(ge=0)] | Annotated[str, Field(min_length=1)]] = (
        Field(default=[], description="a list of token ids and texts of one token each")
    )
    variant: Literal["lora", "rslora", "dora"] = Field(
        default="lora", description="lora, rslora or dora"
    )
    loraplus_lr_ratio: Annotated[Number, Field(gt=0)] | None = Field(
        default=None,
        description="null, or a number above 0 that the learning rate of B is multiplied by; 16 is "
        "common",
    )
    init: str = Field(default="default", description="default or gaussian")
    init_from: PathText | None = Field(
        default=None,
        description="null, or a PEFT adapter directory or GGUF adapter to continue from",
    )

    peft_layers: Literal["auto", "model.layers", "model.language_model.layers"] = Field(
        default="auto",
        description="where PEFT finds the layers: auto, the class that the family's checkpoints "
        "open as; model.layers, one for text; or model.language_model.layers, one for images, too",
    )

    @field_validator("init")
    @classmethod
    def _known_init(cls, init: str) -> str:
        name = init.lower()
        if name.startswith(("pissa", "olora", "loftq", "corda", "lora_ga")):
            raise ValueError(f"got {init!r}; {_CHANGES_THE_BASE}")
        if init not in ("default", "gaussian"):
            raise ValueError(f"got {init!r}; allowed here: default or gaussian.")
        return init

    @field_validator("targets")
    @classmethod
    def _known_targets(cls, targets: str | list[str]) -> str | list[str]:
        allowed = f"allowed here: {cls.model_fields['targets'].description}."
        if isinstance(targets, str):
            if targets == "all-linear":
                return targets
            if re.fullmatch(r"\w*", targets):
                _check_name(targets, allowed)
            _check_pattern(targets)
            return targets
        if not targets:
            raise ValueError(f"got an empty list, so nothing would be trained; {allowed}")
        _check_names(targets, allowed)
        return targets

    @field_validator("exclude")
    @classmethod
    def _known_exclude(cls, exclude: str | list[str]) -> str | list[str]:
        allowed = f"allowed here: {cls.model_fields['exclude'].description}."
        if isinstance(exclude, str):
            if re.fullmatch(r"\w*", exclude):
                _check_name(exclude, allowed)
            _check_pattern(exclude)
        else:
            _check_names(exclude, allowed)
        return exclude

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _regular(cls, pattern: dict[str, float]) -> dict[str, float]:
        for name in pattern:
            _check_pattern(name)
        return pattern

    @field_validator("layers")
    @classmethod
    def _distinct_layers(cls, layers: str | LastLayers | list[int]) -> str | LastLayers | list[int]:
        if isinstance(layers, list):
            if not layers:
                raise ValueError("got an empty list, so nothing would be trained; try all.")
            twice = next((n for i, n in enumerate(layers) if n in layers[:i]), None)
            if twice is not None:
                raise ValueError(f"got the layer {twice} twice; name each layer once.")
        return layers

    @model_validator(mode="after")
    def _whole_inputs_of_dora(self) -> Self:
        if self.variant == "dora" and self.dropout:
            raise ValueError(
                f"variant: dora and dropout: {self.dropout:g} are both given: under DoRA dropout "
                "is one of the base's product, too, which then has to be computed twice; that is "
                "not supported. Keep one of them."
            )
        return self

    @model_validator(mode="after")
    def _begins_once(self) -> Self:
        if self.init_from is not None and self.init != "default":
            raise ValueError(
                f"init is {self.init} and init_from is given, too: an adapter that is continued "
                "begins with its own numbers. Leave one of them out."
            )
        return self

    @property
    def gguf_form(self) -> Literal["gguf", "merged-gguf"]:
        """As what `lora export` can write it: an adapter alone is products of A and B of layers."""
        merges = self.variant == "dora" or self.trainable_tokens or self._names_embedding
        return "merged-gguf" if merges else "gguf"

    @property
    def _names_embedding(self) -> bool:
        """Whether the embedding is a target, in a model that lets it be one."""
        path = [EMBEDDING_PATH]
        named = self.targets != "all-linear" and _matched(self.targets, path)
        return bool(named) and not _matched(self.exclude, path)

    @property
    def scale(self) -> float:
        """What the product B·A is multiplied by: alpha / rank, in rslora alpha / √rank."""
        return self.scale_of(self.rank, self.alpha)

    def scale_of(self, rank: int, alpha: float) -> float:
        """The same of a matrix with a rank and an alpha of its own."""
        return alpha / (math.sqrt(rank) if self.variant == "rslora" else rank)

    def resolve_targets(self, architecture: Architecture) -> list[str]:
        """Returns the PEFT names of the adapted matrices; all-linear leaves out lm_head, as PEFT.

        Raises:
            InputError: one is asked for that the model doesn't have.
        """
        found = {path.rpartition(".")[2] for path in self._targeted(architecture, range(1 << 20))}
        return [name for name in (*architecture.matrices, EMBEDDING.module) if name in found]

    def resolve_modules(self, architecture: Architecture) -> dict[str, LowRank]:
        """Rank and scale of each adapted matrix by PEFT's path (`model.layers.0.mlp.up_proj`).

        Raises:
            InputError: a layer, a target or a pattern fits nothing that the model has.
        """
        layers = self.resolve_layers(architecture.n_layers)
        paths = self._targeted(architecture, layers)
        if not paths:
            return {}  # AdapterLayout says why
        excluded = _matched(self.exclude, paths)
        left = [path for path in paths if path not in excluded]
        for name in [] if isinstance(self.exclude, str) else self.exclude:
            if not _matched([name], paths):
                raise InputError(
                    f"adapter.exclude: got {name!r}, but adapter.targets and adapter.layers leave "
                    "nothing of that name to exclude."
                )
        if isinstance(self.exclude, str) and not excluded:
            raise InputError(
                f"adapter.exclude: {self.exclude!r} fits none of the paths that adapter.targets "
                f"and adapter.layers give, such as {paths[0]}."
            )
        if not left:
            raise InputError("adapter.exclude: leaves nothing to train.")
        if self.variant == "dora" and HEAD.module in left:
            raise InputError(
                f"adapter.variant: dora is not supported for {HEAD.module}, whose rows are scaled "
                "nowhere else; leave it out of adapter.targets, or take variant: lora."
            )
        self._check_embedding(left)
        ranks, alphas = (
            _by_pattern(name, values, left)
            for name, values in (
                ("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)
            )
        )  # fmt: skip
        found = {}
        for path in left:
            rank = int(ranks.get(path, self.rank))
            found[path] = LowRank(rank, self.scale_of(rank, alphas.get(path, self.alpha)))
        return found

    def _check_embedding(self, paths: Sequence[str]) -> None:
        """Refuses what does not go with an embedding that is adapted."""
        if EMBEDDING_PATH not in paths:
            return
        for key, there, why in (
            ("variant: dora", self.variant == "dora", "rows that are looked up have no magnitudes"),
            ("loraplus_lr_ratio", self.loraplus_lr_ratio, "LoRA+ gives it a rate of its own"),
            ("trainable_tokens", self.trainable_tokens, "they are rows of it"),
        ):
            if there:
                raise InputError(
                    f"adapter.{key} is not supported beside the target {EMBEDDING.module}: {why}. "
                    "Leave one of them out."
                )

    def _targeted(self, architecture: Architecture, layers: Sequence[int]) -> list[str]:
        """Paths of the matrices that are targets, in the model's order."""
        wanted = set(layers) if not isinstance(layers, range) else layers
        every = [
            matrix.peft_path(layer)
            for layer, spec in enumerate(architecture.layers)
            if layer in wanted
            for group in spec.groups.values()
            for matrix in group
        ]
        if self.targets == "all-linear":
            return every
        every += [HEAD.peft_path(architecture.n_layers), EMBEDDING_PATH]
        if isinstance(self.targets, str) and _NAME.fullmatch(self.targets) is None:
            found = _matched(self.targets, every)
            if not found:
                raise InputError(
                    f"adapter.targets: {self.targets!r} fits none of the model's paths, such as "
                    f"{every[0]}."
                )
            return found
        names = [self.targets] if isinstance(self.targets, str) else self.targets
        for name in names:
            last = name.rpartition(".")[2]
            if last not in architecture.matrices and last != EMBEDDING.module:
                raise InputError(
                    f"adapter.targets: got {name!r}, but a model of the architecture "
                    f"{architecture.name!r} has {', '.join(architecture.matrices)}."
                )
            if name != last and not _matched([name], every):
                raise InputError(
                    f"adapter.targets: got {name!r}, which fits none of the model's paths in "
                    f"adapter.layers, such as {every[0]}."
                )
        return _matched(names, every)

    def resolve_layers(self, n_layers: int) -> list[int]:
        """Returns the numbers of the adapted layers, lowest first.

        Args:
            n_layers: layers that the model has.

        Raises:
            InputError: more layers are asked for than the model has, or one that it lacks.
        """
        if isinstance(self.layers, LastLayers):
            if self.layers.last > n_layers:
                raise InputError(
                    f"adapter.layers: got {{last: {self.layers.last}}}, but the model has "
                    f"{n_layers} layers."
                )
            return list(range(n_layers - self.layers.last, n_layers))
        if isinstance(self.layers, str):
            return list(range(n_layers))
        if max(self.layers) >= n_layers:
            raise InputError(
                f"adapter.layers: got the layer {max(self.layers)}, but the model has {n_layers} "
                f"layers, numbered 0 to {n_layers - 1}."
            )
        return sorted(self.layers)


def _check_names(names: Sequence[str], allowed: str) -> None:
    for index, name in enumerate(names):
        _check_name(name, allowed)
        if name in names[:index]:
            raise ValueError(f"got {name!r} twice; name each matrix once.")


def _matched(names: str | Sequence[str], paths: Sequence[str]) -> list[str]:
    """The paths that names or a pattern fit: as PEFT's check_target_module_exists decides it.

    Args:
        names: one name, a regular expression for whole paths, or a list of names, each the end of
            a path.
    """
    if isinstance(names, str):
        if _NAME.fullmatch(names) is None:
            pattern = re.compile(names)
            return [path for path in paths if pattern.fullmatch(path)]
        names = [names]
    ends = tuple(f".{name}" for name in names)
    return [path for path in paths if path in names or path.endswith(ends)]


def _by_pattern(key: str, values: Mapping[str, float], paths: Sequence[str]) -> dict[str, float]:
    """What PEFT's get_pattern_key gives each path: of the first pattern that its end fits.

    Raises:
        InputError: one fits nothing that is adapted.
    """
    fits: list[tuple[Callable[[str], object], float]] = []
    for pattern, value in values.items():
        match = re.compile(rf"(.*\.)?({pattern})$").match
        if not any(match(path) for path in paths):
            raise InputError(
                f"adapter.{key}: {pattern!r} fits none of the adapted matrices, such as {paths[0]}."
            )
        fits.append((match, value))
    found = {}
    for path in paths:
        of_path = next((value for match, value in fits if match(path)), None)
        if of_path is not None:
            found[path] = of_path
    return found
