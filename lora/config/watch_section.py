"""The keys of `train:` that say how a run is watched: evaluations, the best adapter, samples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from lora.config.durations import checked_epochs
from lora.config.errors import did_you_mean
from lora.config.eval_metrics import metric_names
from lora.config.fields import Count, Duration, Number, Section, Text, word_from_switch
from lora.shaders.untrusted import shown

REPORTERS = ("tensorboard", "wandb", "csv")
_STEPS_OR_EPOCHS = "null, a whole number of steps, or epochs such as 0.5 epochs"


def _epochs_text(value: Any) -> Any:
    """Refuses a text that is no number of epochs, with one sentence for both forms."""
    return checked_epochs(value) if isinstance(value, str) else value


Every = Annotated[Count | str | None, BeforeValidator(_epochs_text)]


def _several(value: Any) -> Any:
    """One where a list may stand; null is none."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


class WatchConfig(Section):
    """How often a run is evaluated, saved and sampled, what is kept, and who is told."""

    eval_every: Every = Field(default=None, description=_STEPS_OR_EPOCHS)
    eval_at_start: bool = Field(default=True, description="true or false")
    eval_samples: Count | None = Field(
        default=None, description="null, or a whole number of rows, at least 1"
    )
    best: Annotated[Text, BeforeValidator(word_from_switch)] = Field(
        default="auto", description="auto, off, or a metric of the evaluation such as eval_loss"
    )
    load_best_model_at_end: bool = Field(default=False, description="true or false")
    early_stopping_patience: Count | None = Field(
        default=None, description="null, or a whole number of evaluations, at least 1"
    )
    early_stopping_threshold: Number = Field(
        default=0.0, ge=0, description="a number of at least 0"
    )
    sample_prompts: Annotated[list[Text | list[dict[str, Any]]], BeforeValidator(_several)] = Field(
        default=[], description="a list of prompts, each a text or a list of messages"
    )
    sample_every: Every = Field(default=None, description=_STEPS_OR_EPOCHS)
    sample_tokens: Count = Field(default=64, description="a whole number of at least 1")
    report_to: Annotated[
        list[Literal["tensorboard", "wandb", "csv"]], BeforeValidator(_several)
    ] = Field(default=[], description=f"a list of {', '.join(REPORTERS)}")
    save_every: Count | Duration | None = Field(
        default="10m", description="null, a whole number of steps, or a time such as 90s, 10m or 1h"
    )
    keep_checkpoints: Count = Field(default=3, description="a whole number of at least 1")

    @field_validator("sample_prompts")
    @classmethod
    def _messages(cls, prompts: list[Any]) -> list[Any]:
        for prompt in prompts:
            if isinstance(prompt, list) and not (
                prompt and all({"role", "content"} <= message.keys() for message in prompt)
            ):
                raise ValueError(
                    f"got {shown(prompt)}; a prompt is a text, or messages: "
                    '[{"role": "user", "content": "…"}].'
                )
        return prompts

    @field_validator("report_to")
    @classmethod
    def _each_once(cls, names: list[str]) -> list[str]:
        return list(dict.fromkeys(names))

    @model_validator(mode="after")
    def _settings_that_count(self) -> Self:
        if self.early_stopping_patience is not None and self.eval_every is None:
            raise ValueError(
                f"early_stopping_patience is {self.early_stopping_patience}, but eval_every is "
                "null: nothing is evaluated on the way; set eval_every."
            )
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError(
                f"early_stopping_threshold is {self.early_stopping_threshold:g}, but "
                "early_stopping_patience is null: the run never stops early; set both."
            )
        if self.best == "off":
            for name in ("load_best_model_at_end", "early_stopping_patience"):
                if getattr(self, name):
                    raise ValueError(f"{name} needs a metric to go by, but best is off.")
        if self.sample_every is not None and not self.sample_prompts:
            raise ValueError(
                f"sample_every is {self.sample_every}, but there are no sample_prompts; give some."
            )
        return self

    @property
    def best_metric(self) -> str | None:
        """The metric that tells which adapter is best; None for none."""
        if self.best == "off":
            return None
        return "eval_loss" if self.best == "auto" else self.best


def check_watched(watch: WatchConfig, *, evaluates: bool, sets: Iterable[str]) -> None:
    """Refuses what wants an evaluation where there is nothing to evaluate on, and unknown metrics.

    Args:
        watch: the settings.
        evaluates: whether there is something to evaluate on.
        sets: names of the eval sets.

    Raises:
        ValueError: it is one of these, as a sentence.
    """
    if not evaluates:
        wanting = {
            "eval_every": watch.eval_every,
            "eval_samples": watch.eval_samples,
            "best": None if watch.best in ("auto", "off") else watch.best,
            "load_best_model_at_end": watch.load_best_model_at_end or None,
        }
        for name, value in wanting.items():
            if value is not None:
                raise ValueError(
                    f"train.{name} is {shown(value)}, but data.eval is null; name the examples to "
                    f"evaluate on, or leave train.{name} out."
                )
        return
    metric, known = watch.best_metric, metric_names(sets)
    if metric is not None and metric not in known:
        near = did_you_mean(metric, known) or f"; allowed here: auto, off, {', '.join(known)}."
        raise ValueError(f"train.best: got {metric!r}{near}")
