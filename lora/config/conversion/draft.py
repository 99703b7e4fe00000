"""A config that is being put together out of another tool's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from lora.config.data_section import DataConfig
from lora.config.fields import Section
from lora.config.schema import AdapterConfig, ModelConfig, TrainConfig, checked_config
from lora.shaders.errors import InputError
from lora.shaders.untrusted import shown

# What every config needs, for checking one key alone.
_LEAST = {"model": {"path": "m.gguf"}, "data": {"train": "t.jsonl"}, "output": "o"}


class Draft:
    """Our keys by their dotted names, what had no counterpart, and what to look at.

    Args:
        source: the other tool's keys; what is read of them is crossed off.

    Attributes:
        values: our keys that are set.
        lacking: their key to why it isn't taken over.
        notes: what to look at, as sentences.
        needless: their keys that mean nothing here.
    """

    def __init__(self, source: Mapping[str, Any]) -> None:
        self._left = dict(source)
        self.values: dict[str, Any] = {}
        self.lacking: dict[str, str] = {}
        self.notes: list[str] = []
        self.needless: list[str] = []

    def take(self, key: str, default: Any = None) -> Any:
        """A value of theirs, crossed off; the default for null, too."""
        value = self._left.pop(key, None)
        return default if value is None else value

    def has(self, key: str) -> bool:
        """Whether there is such a value of theirs, not crossed off."""
        return self._left.get(key) is not None

    def set(self, key: str, value: Any, theirs: str) -> None:
        """Sets one of our keys, if it takes the value; else their key has no counterpart."""
        if value is None:
            return
        refusal = refusal_of(key, value)
        if refusal is None:
            self.values[key] = value
        else:
            unknown = refusal.startswith("unknown key")
            self.lacking[theirs] = shown(value) if unknown else refusal

    def rename(self, names: Mapping[str, str]) -> None:
        """Takes over values as they are: of their keys to ours."""
        for theirs, ours in names.items():
            self.set(ours, self.take(theirs), theirs)

    def drop(self, *names: str) -> None:
        """Crosses off what means nothing here, because it is always so or never."""
        self.needless += [name for name in names if self._left.pop(name, None) is not None]

    def finish(self) -> None:
        """What is left has no counterpart; nulls and switches that are off need none."""
        for key, value in self._left.items():
            if value not in (None, False, "", [], {}):
                self.lacking.setdefault(key, shown(value))

    @property
    def nested(self) -> dict[str, Any]:
        """Our keys as nested mappings, sections in the order of our configs."""
        found: dict[str, Any] = {}
        for section in ("model", "adapter", "data", "train"):
            keys = [key for key in self.values if key.startswith(f"{section}.")]
            if keys:
                order = _order(section)
                keys.sort(key=lambda key: order.index(key.partition(".")[2]))
                found[section] = {key.partition(".")[2]: self.values[key] for key in keys}
        return found | {key: value for key, value in self.values.items() if "." not in key}

    def text(self, source: str) -> str:
        """The config as YAML, with what is not in it as comments.

        Args:
            source: what it was made from.
        """
        lines = [f"# Written by `lora convert-config` from {source}."]
        lines += [f"# Look at: {note}" for note in self.notes]
        lines += [f"# Not taken over: {key} ({why})" for key, why in self.lacking.items()]
        comments = "".join(f"{' '.join(line.split())}\n" for line in lines)
        return comments + yaml.safe_dump(self.nested, sort_keys=False, allow_unicode=True)


def _order(section: str) -> list[str]:
    """The keys of a section as our configs have them."""
    if section == "train":  # what it shares with watching a run comes behind its own
        return [*TrainConfig.__annotations__, *TrainConfig.model_fields]
    models: dict[str, type[Section]] = {
        "model": ModelConfig,
        "adapter": AdapterConfig,
        "data": DataConfig,
    }
    return list(models[section].model_fields)


def refusal_of(key: str, value: Any) -> str | None:
    """Why one of our keys doesn't take a value; None where it does."""
    values: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in _LEAST.items()}
    section, dot, name = key.rpartition(".")
    if dot:
        values.setdefault(section, {})[name] = value
    else:
        values[name] = value
    if key in _NEEDS:
        other_section, _, other = _NEEDS[key][0].partition(".")
        values.setdefault(other_section, {})[other] = _NEEDS[key][1]
    if key.startswith("train.") and "eval" not in values["data"]:
        values["data"]["eval"] = "e.jsonl"
    try:
        checked_config(values, "")
    except InputError as error:
        lines = [line.removeprefix(": ") for line in str(error).splitlines()]
        return " ".join(line.removeprefix(f"{key}: ") for line in lines).rstrip(".")
    return None


# Keys that are checked beside another one.
_NEEDS: dict[str, tuple[str, Any]] = {
    "train.early_stopping_patience": ("train.eval_every", 1),
    "train.early_stopping_threshold": ("train.early_stopping_patience", 1),
    "data.streaming": ("train.steps", 1),
}


def base_model(draft: Draft, name: str | None, theirs: str) -> None:
    """Sets model.path: a GGUF as it is, a repository of the Hub as one of GGUFs."""
    if name is None:
        return
    if name.endswith(".gguf"):
        draft.set("model.path", name, theirs)
        return
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        draft.set("model.path", f"hf:{name}-GGUF:Q4_K_M", theirs)
        draft.notes.append(
            f"{theirs}: {name} holds safetensors, and GGUFs are trained here: model.path names a "
            "repository as they are often called; put in the one that you run."
        )
        return
    draft.set("model.path", name, theirs)
    draft.notes.append(f"{theirs}: {name}: model.path must be a GGUF of this model.")


def schedule(draft: Draft, name: str | None, theirs: str) -> None:
    """Sets train.schedule by transformers' name for it."""
    names = {
        "constant_with_warmup": "constant",
        "cosine_decay": "cosine",
        "linear_schedule": "linear",
    }
    if name is not None:
        draft.set("train.schedule", names.get(str(name), str(name)), theirs)


_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw", "adamw_apex_fused")


def optimizer(draft: Draft, name: Any, theirs: str) -> None:
    """Sets train.optimizer, unless it is AdamW, the default."""
    if name is not None and str(name).lower() not in _ADAMW:
        draft.set("train.optimizer", str(name).lower(), theirs)
