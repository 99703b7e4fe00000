"""`data:`, the examples and how they become tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from lora.config.errors import did_you_mean
from lora.config.fields import (
    Count,
    Number,
    PathText,
    Section,
    Switch,
    Text,
    section_from_nothing,
)
from lora.config.other_names import OTHER_NAMES
from lora.config.paths import expanded

RowFormat = Literal["auto", "chat", "completion", "instruct", "text"]
Overflow = Literal["cut", "drop", "split", "error"]
# What `columns` may map: the names by which rows are known here, and those inside messages.
COLUMNS = (
    "messages", "prompt", "completion", "instruction", "input", "output", "text", "system",
    "history", "tools", "chat_template_kwargs", "weight", "train", "role", "content",
)  # fmt: skip
_SOURCE = (
    "a file, a directory, the name of a Hugging Face data set, a mapping with path or name, or a "
    "list of these"
)


def _known_columns(columns: Mapping[str, str]) -> Mapping[str, str]:
    for name in columns:
        if name not in COLUMNS:
            suggestion = did_you_mean(name, list(COLUMNS))
            raise ValueError(
                f"{name!r} is no column that is known here{suggestion}; columns maps a "
                f"name here to yours, {{prompt: question}}; names here are {', '.join(COLUMNS)}."
            )
    return columns


class SourceConfig(Section):
    """Where rows come from, and which of them are taken.

    Attributes:
        path: a file or a directory; or `name`, of a data set on the Hugging Face hub.
        config, split: of a data set; `train[:20%]` takes a part.
        format: of its rows; None for data.format.
        columns: names here to its names; those of data.columns that it doesn't map hold, too.
        weight: how often an epoch takes its rows: 2 each twice, 0.5 a half, by the seed.
        max_samples: its first rows at most; None for all.
        sample_by: what a row of a plain text file is.
    """

    path: PathText | None = Field(default=None, description="a file or a directory")
    name: Text | None = Field(default=None, description="the name of a Hugging Face data set")
    config: Text | None = Field(default=None, description="null, or a data set's config")
    split: Text | None = Field(default=None, description="null, or a split, such as train[:20%]")
    format: RowFormat | None = Field(
        default=None, description="null, auto, chat, completion, instruct or text"
    )
    columns: Annotated[dict[str, Text], BeforeValidator(section_from_nothing)] = Field(
        default={}, description="a mapping of names here to names of the data"
    )
    weight: Number = Field(default=1.0, gt=0, le=10_000, description="a number above 0")
    max_samples: Count | None = Field(
        default=None, description="null, or a whole number of at least 1"
    )
    sample_by: Literal["paragraph", "line", "document"] = Field(
        default="paragraph", description="paragraph, line or document"
    )

    @field_validator("columns")
    @classmethod
    def _columns(cls, columns: dict[str, str]) -> dict[str, str]:
        _known_columns(columns)
        return columns

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.name is None):
            raise ValueError(
                "give path (a file or a directory) or name (of a Hugging Face data set), and not "
                "both."
            )
        return self

    @property
    def place(self) -> str:
        """The path or the name."""
        return self.path or self.name or ""


def _source(value: Any) -> str | SourceConfig:
    """One source.

    Raises:
        ValueError: it is none, as a sentence.
    """
    if isinstance(value, SourceConfig):
        return value
    if isinstance(value, str) and value:
        return expanded(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"got {value!r}; allowed here: {_SOURCE}.")
    try:
        return SourceConfig.model_validate(value)
    except ValidationError as error:
        finding = error.errors(include_url=False)[0]
    key = str(finding["loc"][0]) if finding["loc"] else ""
    if finding["type"] == "value_error":
        raise ValueError(f"{key + ': ' if key else ''}{finding['ctx']['error']}")
    fields = SourceConfig.model_fields
    if key in fields:
        allowed = fields[key].description
        raise ValueError(f"{key}: got {finding['input']!r}; allowed here: {allowed}.")
    suggestion = did_you_mean(key, list(fields)) or f"; allowed here: {', '.join(fields)}."
    if key in OTHER_NAMES:
        suggestion = f"; its name here is {OTHER_NAMES[key]}."
    raise ValueError(f"{key}: unknown key{suggestion}")


def _sources(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError(f"got []; allowed here: {_SOURCE}.")
        return [_source(one) for one in value]
    return _source(value)


def _eval_sets(value: Any) -> Any:
    """Sources; or a mapping of names to sources, where no key is one of a source."""
    if not isinstance(value, Mapping) or not value or set(value) & set(SourceConfig.model_fields):
        return _sources(value)
    found = {}
    for name, sources in value.items():
        if not isinstance(name, str) or not _SET_NAME.fullmatch(name):
            raise ValueError(
                f"got the name {name!r} of a set; a name is letters, digits, - and _, since "
                "metrics are called after it (eval_NAME_loss)."
            )
        if name in OTHER_NAMES or name.lower() in _METRICS:
            raise ValueError(f"got {name!r}; a set needs another name, or is a source's key meant?")
        try:
            found[name] = _sources(sources)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if found[name] is None:
            raise ValueError(f"{name}: got null; allowed here: {_SOURCE}.")
    return found


_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_METRICS = ("loss", "perplexity", "accuracy", "exact", "exact_match")  # eval_exact_match is one
_Sources = str | SourceConfig | list[str | SourceConfig]


def _listed(given: _Sources | dict[str, _Sources] | None) -> list[str | SourceConfig]:
    """All sources in one list, those of each named set together."""
    if given is None:
        return []
    if isinstance(given, dict):
        return [one for sources in given.values() for one in _listed(sources)]
    return given if isinstance(given, list) else [given]


class DataConfig(Section):
    """`data:`, the examples and how they become tokens."""

    train: Annotated[_Sources | None, BeforeValidator(_sources)] = Field(
        default=None, description=_SOURCE
    )
    eval: Annotated[_Sources | dict[str, _Sources] | None, BeforeValidator(_eval_sets)] = Field(
        default=None, description=f"null, {_SOURCE}, or a mapping of names to these"
    )
    eval_share: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        default=None, description="null, or a number between 0 and 1"
    )
    format: RowFormat = Field(
        default="auto", description="auto, chat, completion, instruct or text"
    )
    columns: Annotated[dict[str, Text], BeforeValidator(section_from_nothing)] = Field(
        default={}, description="a mapping of names here to names of the data"
    )
    max_length: int = Field(
        default=512, ge=2, le=1 << 24, description="a whole number of tokens, at least 2"
    )
    overflow: Overflow = Field(default="cut", description="cut, drop, split or error")
    packing: bool = Field(default=False, description="true or false")
    streaming: bool = Field(default=False, description="true or false")
    shuffle_buffer: Count = Field(default=1000, description="a whole number of at least 1")
    chat_template: Text | None = Field(
        default=None, description="null, a file that holds a Jinja chat template, or its text"
    )
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(section_from_nothing)] = Field(
        default={}, description="a mapping of the chat template's variables to values"
    )
    train_on: Literal["completion", "all", "last"] = Field(
        default="completion", description="completion, all or last"
    )
    roles_to_train: Annotated[list[Text], Field(min_length=1)] = Field(
        default=["assistant"], description="a list of roles, such as [assistant]"
    )
    train_on_eos: Literal["turn", "all", "last", "none"] = Field(
        default="turn", description="turn, all, last or none"
    )
    append_eos: Switch = Field(default="auto", description="auto, on or off")
    shuffle: bool = Field(default=True, description="true or false")

    @field_validator("columns")
    @classmethod
    def _columns(cls, columns: dict[str, str]) -> dict[str, str]:
        _known_columns(columns)
        return columns

    @model_validator(mode="after")
    def _roles_that_count(self) -> Self:
        if self.train_on == "all" and self.roles_to_train != ["assistant"]:
            raise ValueError(
                "train_on: all trains every token, whatever the role: leave roles_to_train out, or "
                "take train_on: completion."
            )
        return self

    @model_validator(mode="after")
    def _one_eval(self) -> Self:
        if self.eval is not None and self.eval_share is not None:
            raise ValueError(
                "eval and eval_share are both given; keep one: eval_share takes rows out of train."
            )
        return self

    @model_validator(mode="after")
    def _eval_once(self) -> Self:
        weighted = next((s for s in self.sources("eval") if s.weight != 1), None)
        if weighted is not None:
            raise ValueError(
                f"eval: every row is evaluated once, so weight can't be {weighted.weight:g}; leave "
                "it out, or take part of the rows with split or max_samples."
            )
        return self

    @model_validator(mode="after")
    def _whole_or_streamed(self) -> Self:
        if not self.streaming:
            return self
        if self.eval_share is not None:
            raise ValueError(
                "streaming: rows that are streamed are not counted, so eval_share can't take a "
                "share of them; name the examples to evaluate on with eval."
            )
        weighted = [s for s in self.sources("train") if s.weight != 1]
        if weighted:
            raise ValueError(
                f"streaming: rows that are streamed are taken once each, so weight can't be "
                f"{weighted[0].weight:g}; leave it out."
            )
        return self

    @property
    def evaluates(self) -> bool:
        """Whether there is something to evaluate on."""
        return self.eval is not None or self.eval_share is not None

    @property
    def eval_sets(self) -> dict[str, int]:
        """Names of the eval sets, with how many of `sources("eval")` each has; {} without names."""
        if not isinstance(self.eval, dict):
            return {}
        return {name: len(_listed(sources)) for name, sources in self.eval.items()}

    def sources(self, split: Literal["train", "eval"]) -> list[SourceConfig]:
        """`train` or `eval` as mappings, whose formats and columns are those that hold.

        A name is a path if something lies there, or if it can't be a name of the hub.
        """
        given = self.train if split == "train" else self.eval
        found = []
        for one in _listed(given):
            source = SourceConfig(path=one) if isinstance(one, str) else one
            found.append(
                source.model_copy(
                    update={
                        "format": source.format or self.format,
                        "columns": {**self.columns, **source.columns},
                    }
                )
            )
        return found
