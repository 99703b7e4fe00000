"""The config of a run: every key, its default, and what it allows.

A key that stands here is used somewhere; what this version cannot do yet is refused here, so
that no option is accepted and then dropped.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from lora.config.adapter_section import AdapterConfig
from lora.config.data_section import DataConfig
from lora.config.errors import config_problems
from lora.config.fields import (
    Count,
    MemorySize,
    Number,
    PathText,
    Section,
    Switch,
    Text,
    section_from_nothing,
    word_from_switch,
)
from lora.config.optimization import Optimization
from lora.config.watch_section import WatchConfig, check_watched
from lora.config.yaml_file import parse_yaml, read_yaml_mapping
from lora.shaders.errors import InputError
from lora.shaders.untrusted import shown
from lora.storage.hub import check_repository
from lora.storage.stores import MODEL_NAME_FORMS, check_model_name


class ModelConfig(Section):
    """`model:`, the frozen base."""

    path: PathText = Field(description=MODEL_NAME_FORMS)
    tokenizer: PathText | None = Field(
        default=None, description="null, a tokenizer.json, or a directory that holds one"
    )

    @field_validator("path")
    @classmethod
    def _well_formed_path(cls, path: str) -> str:
        try:
            check_model_name(path)
        except InputError as error:
            raise ValueError(str(error)) from None
        return path


class TrainConfig(Optimization, WatchConfig):
    """`train:`, how the adapter is fitted; what it shares with watching a run stands there."""

    epochs: Number = Field(default=1.0, gt=0, le=10_000, description="a number above 0")
    steps: Count | None = Field(default=None, description="null, or a whole number of at least 1")
    batch_size: Count = Field(default=4, description="a whole number of at least 1")
    gradient_accumulation: Count = Field(default=1, description="a whole number of at least 1")
    learning_rate: Number = Field(default=2.0e-4, gt=0, description="a number above 0")
    warmup_ratio: Annotated[Number, Field(ge=0, lt=1)] | None = Field(
        default=0.03, description="a number from 0 to below 1, the share of all steps"
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="null, or a whole number of at least 0"
    )
    max_grad_norm: Annotated[Number, Field(gt=0)] | None = Field(
        default=1.0, description="a number above 0, or null for no clipping"
    )
    precision: Literal["auto", "f32", "f16"] = Field(default="auto", description="auto, f32 or f16")
    recompute: Switch = Field(
        default="auto",
        description="auto, on or off",
    )
    memory_limit: MemorySize = Field(default="auto", description="auto, or a size such as 7GiB")
    tuning: Annotated[Literal["auto", "off"], BeforeValidator(word_from_switch)] = Field(
        default="auto", description="auto or off"
    )
    reuse_frozen_prefix: Switch = Field(default="auto", description="auto, on or off")
    seed: int = Field(
        default=0, ge=0, le=2**32 - 1, description="a whole number from 0 to 4294967295"
    )
    on_device_loss: Literal["stop", "retry"] = Field(default="stop", description="stop or retry")
    max_submission_seconds: Annotated[Number, Field(gt=0)] | None = Field(
        default=None, description="null, or a number of seconds above 0"
    )
    comm_dtype: Literal["f32", "f16"] = Field(default="f32", description="f32 or f16")

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        given = self.model_fields_set
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            if "warmup_ratio" in given:
                raise ValueError(
                    f"warmup_ratio ({self.warmup_ratio:g}) and warmup_steps ({self.warmup_steps}) "
                    "are both given; keep one and set the other to null."
                )
            # The default ratio gives way; object.__setattr__ because the config is frozen.
            object.__setattr__(self, "warmup_ratio", None)
        return self

    def resolve_warmup(self, total_steps: int) -> int:
        """Returns the number of warm-up steps, rounded up as transformers does.

        Raises:
            InputError: they are more than the run has.
        """
        if self.warmup_steps is not None:
            if self.warmup_steps > total_steps:
                steps = "1 step" if total_steps == 1 else f"{total_steps} steps"
                raise InputError(
                    f"train.warmup_steps: got {self.warmup_steps}, but the run has {steps}: "
                    "train.learning_rate would never be reached. Lower it, or train longer."
                )
            return self.warmup_steps
        return math.ceil((self.warmup_ratio or 0.0) * total_steps)


class Config(Section):
    """A whole config."""

    model: ModelConfig = Field(description="the base model")
    adapter: Annotated[AdapterConfig, BeforeValidator(section_from_nothing)] = AdapterConfig()
    data: DataConfig = Field(description="the data")
    train: Annotated[TrainConfig, BeforeValidator(section_from_nothing)] = TrainConfig()
    device: Text | Annotated[int, Field(ge=0)] = Field(
        default="auto", description="auto, shared, a device's index, or part of its name"
    )
    webgpu: Literal["auto", "wgpu", "dawn"] = Field(
        default="auto", description="auto, wgpu or dawn"
    )
    output: PathText = Field(description="the directory that the run writes to")
    hub: Text | None = Field(
        default=None, description="null, or ORG/REPO, the model repository to push the adapter to"
    )

    @field_validator("hub")
    @classmethod
    def _repository(cls, hub: str | None) -> str | None:
        if hub is not None:
            check_repository(hub)
        return hub

    @model_validator(mode="after")
    def _evaluated_on_something(self) -> Self:
        check_watched(self.train, evaluates=self.data.evaluates, sets=self.data.eval_sets)
        return self

    @model_validator(mode="after")
    def _steps_of_a_stream(self) -> Self:
        if self.data.streaming and self.train.steps is None:
            raise ValueError(
                "data.streaming: rows that are streamed are not counted, so train.steps must say "
                "how long to train."
            )
        return self

    def dump_yaml(self) -> str:
        """Returns the config as YAML, defaults filled in; `load_config` reads it back equal."""
        values = self.model_dump(mode="json")
        own_first = [*TrainConfig.__annotations__, *values["train"]]
        values["train"] = {key: values["train"][key] for key in own_first}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


_OF_MODELS = {".gguf", ".safetensors"}
_OF_DATA = {".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst"}


def load_config(path: str, overrides: Sequence[str] = (), *, needs_data: bool = True) -> Config:
    """Reads and checks a config file.

    Args:
        path: a YAML file.
        needs_data: False where data.train may be missing, since the rows are given otherwise.
        overrides: `KEY=VALUE` each, the key dotted (`train.steps=10`), the value in YAML; a
            later one wins.

    Raises:
        InputError: the file can't be read or is no YAML; or keys or values are wrong, one line
            for each: where, the key, what was given, what is allowed.

    Example:
        >>> load_config("lora.yaml", ["train.steps=10"]).train.steps
        10
    """
    _check_is_no_other_file(path)
    return checked_config(read_yaml_mapping(path), path, overrides, needs_data=needs_data)


def _check_is_no_other_file(path: str) -> None:
    """Refuses a model or data where a config is wanted, with what to do.

    Raises:
        InputError: the name is one of these.
    """
    suffixes = {suffix.lower() for suffix in Path(path).suffixes}
    if suffixes & _OF_MODELS or path.startswith(("hf:", "ollama:")):
        given = f"--model {shlex.quote(path)} --data DATA"
    elif suffixes & _OF_DATA:
        given = f"--model MODEL --data {shlex.quote(path)}"
    else:
        return
    what = "a model" if "DATA" in given.split() else "data"
    raise InputError(
        f"{path} is {what}, and a config is a YAML file: lora init {given} writes one, and "
        f"lora train {given} needs none."
    )


def checked_config(
    values: dict[str, Any],
    source: str,
    overrides: Sequence[str] = (),
    *,
    needs_data: bool = True,
) -> Config:
    """Checks a config that is no file, as nested mappings.

    Args:
        values: the config; overrides are written into it.
        source: where it comes from, for messages.
        overrides, needs_data: as of `load_config`.

    Raises:
        InputError: keys or values are wrong, one line for each.
    """
    overridden: dict[str, str] = {}
    for override in overrides:
        overridden[_apply_override(values, override)] = override
    problems = {}
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems = config_problems(error, Config, values)
    else:
        if config.data.train is not None or not needs_data:
            return config
        allowed = DataConfig.model_fields["train"].description
        problems["data.train"] = f"missing; give {allowed}."
    lines = []
    for key, sentence in problems.items():
        where = f"--set {overridden[key]}" if key in overridden else source
        lines.append(f"{where}: {key}: {sentence}" if key else f"{where}: {sentence}")
    raise InputError("\n".join(lines))


def _apply_override(values: dict[str, Any], override: str) -> str:
    """Puts one `KEY=VALUE` into the nested mappings and returns its key."""
    key, equals, text = override.partition("=")
    key = key.strip()
    names = key.split(".")
    if not equals or not all(names):
        raise InputError(f"--set {override}: write it as KEY=VALUE, for example train.steps=10.")
    section = values
    for depth, name in enumerate(names[:-1]):
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            outer = ".".join(names[: depth + 1])
            raise InputError(f"--set {override}: {outer} holds {shown(section)}, not a mapping.")
    section[names[-1]] = parse_yaml(text, f"--set {override}")
    return key
