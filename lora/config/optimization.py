"""The part of `train:` that says how numbers follow from gradients: schedule, optimizer, losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from lora.config.errors import did_you_mean
from lora.config.fields import Number, Section
from lora.optim.optimizers import OPTIMIZERS
from lora.optim.schedule import DECAY_TYPES, SCHEDULES
from lora.shaders.errors import InputError

ScheduleName = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_min_lr",
    "cosine_with_restarts",
    "inverse_sqrt",
    "warmup_stable_decay",
]
_COUNTS = ("num_decay_steps", "timescale")
_SHARES = ("min_lr_rate", "min_lr_ratio")


class Optimization(Section):
    """What `TrainConfig` has of it."""

    schedule: ScheduleName = Field(default="cosine", description=", ".join(SCHEDULES))
    schedule_kwargs: dict[str, Any] = Field(
        default={}, description="what transformers' lr_scheduler_kwargs say for the schedule"
    )

    optimizer: Literal["adamw", "adamw_8bit", "lion"] = Field(
        default="adamw", description=", ".join(OPTIMIZERS)
    )
    weight_decay: Number = Field(default=0.0, ge=0, description="a number of at least 0")
    betas: list[Annotated[Number, Field(ge=0, lt=1)]] = Field(
        default=[0.9, 0.999],
        min_length=2,
        max_length=2,
        description="two numbers from 0 to below 1",
    )
    epsilon: Number = Field(default=1.0e-8, gt=0, description="a number above 0")
    neftune_noise_alpha: Annotated[Number, Field(gt=0)] | None = Field(
        default=None, description="null, or a number above 0; 5 is common"
    )

    label_smoothing: Number = Field(
        default=0.0, ge=0, lt=1, description="a number from 0 to below 1; 0.1 is common"
    )
    loss_type: Literal["nll", "dft"] = Field(default="nll", description="nll or dft")

    @model_validator(mode="after")
    def _known_kwargs(self) -> Self:
        _check_kwargs(self.schedule, self.schedule_kwargs)
        return self

    @model_validator(mode="after")
    def _epsilon_of_lion(self) -> Self:
        usual = type(self).model_fields["epsilon"].default
        if self.optimizer == "lion" and self.epsilon != usual:
            raise ValueError(
                f"optimizer: lion takes the sign of its momentum and divides by nothing, so that "
                f"epsilon ({self.epsilon:g}) has no place in it; leave epsilon out."
            )
        return self

    @model_validator(mode="after")
    def _one_loss(self) -> Self:
        if self.label_smoothing and self.loss_type == "dft":
            raise ValueError(
                "label_smoothing and loss_type: dft are both given: DFT weighs each token by the "
                "model's own probability, and smoothing asks for others; keep one."
            )
        return self

    def check_schedule(self, total_steps: int, warmup_steps: int) -> None:
        """Refuses a decay that doesn't fit into the run.

        Raises:
            InputError: it is longer than what the warm-up leaves.
        """
        decay = self.schedule_kwargs.get("num_decay_steps")
        stable = self.schedule_kwargs.get("num_stable_steps", 0)
        if decay is not None and decay + stable > total_steps - warmup_steps:
            raise InputError(
                f"train.schedule_kwargs: num_decay_steps ({decay}) and num_stable_steps ({stable}) "
                f"are more than the {total_steps - warmup_steps} steps behind the warm-up; lower "
                "them, or train longer."
            )


def _check_kwargs(schedule: str, kwargs: Mapping[str, Any]) -> None:
    """Refuses options that the schedule has not, and values that they can't have."""
    known = SCHEDULES[schedule]
    for name, value in kwargs.items():
        if name not in known:
            suggestion = did_you_mean(name, list(known))
            allowed = f"; it takes {', '.join(known)}" if known else "; it takes none"
            raise ValueError(f"schedule_kwargs: {schedule} has no {name!r}{suggestion or allowed}.")
        if name == "decay_type":
            if value not in DECAY_TYPES:
                raise ValueError(
                    f"schedule_kwargs: decay_type is {value!r}; allowed: {', '.join(DECAY_TYPES)}."
                )
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        least = 1 if name in _COUNTS else 0
        whole = name in (*_COUNTS, "num_stable_steps") or (
            name == "num_cycles" and schedule == "cosine_with_restarts"
        )
        if (
            not number
            or not least <= value <= (1 if name in _SHARES else 1e9)
            or (whole and value != int(value))
            or (name == "num_cycles" and value <= 0)
        ):
            kind = "a whole number" if whole else "a number"
            upper = " to 1" if name in _SHARES else ""
            lower = "above 0" if name == "num_cycles" else f"from {least}{upper or ' up'}"
            raise ValueError(f"schedule_kwargs: {name} is {value!r}; allowed: {kind} {lower}.")
    if schedule == "cosine_with_min_lr" and len({"min_lr", "min_lr_rate"} & set(kwargs)) != 1:
        raise ValueError(
            "schedule: cosine_with_min_lr wants to know where it ends: give one of min_lr (a rate) "
            "and min_lr_rate (a share of learning_rate) in schedule_kwargs."
        )
    if schedule == "warmup_stable_decay" and "num_decay_steps" not in kwargs:
        raise ValueError(
            "schedule: warmup_stable_decay wants to know how long it decays: give num_decay_steps "
            "in schedule_kwargs."
        )
