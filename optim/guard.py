"""Whether a step counts, decided on the device, and the loss scale that follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lora.shaders.activations import check_shape
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor

STATE_AT = 64  # in the tensor of metrics: where `gradient_norm`'s state begins
METRICS = 128  # values of that tensor


@dataclass(frozen=True)
class GuardState:
    """What `step_guard` keeps from step to step, in the tensor of metrics.

    Attributes:
        scale: that the loss is multiplied by; a power of two.
        good_steps: since the scale last changed.
        in_a_row: steps skipped, one behind the other, that no smaller scale helps. With
            MOST_IN_A_ROW of them the device skips whatever follows, until the host has set this
            to 0.
        skipped: steps in all.
        overflows: those since the last that counted after which the scale fell: their loss was
            finite.
    """

    scale: float = 1.0
    good_steps: int = 0
    in_a_row: int = 0
    skipped: int = 0
    overflows: int = 0

    MOST_IN_A_ROW: ClassVar[int] = 3
    _PLACE: ClassVar[slice] = slice(STATE_AT + 4, STATE_AT + 9)

    @classmethod
    def of_metrics(cls, values: np.ndarray) -> GuardState:
        """Out of f32 [METRICS]."""
        scale, *counts = (float(value) for value in values[cls._PLACE])
        return cls(scale, *(int(count) for count in counts))

    def put_into(self, values: np.ndarray) -> None:
        """Writes it into f32 [METRICS]."""
        counts = self.good_steps, self.in_a_row, self.skipped, self.overflows
        values[self._PLACE] = [self.scale, *counts]

    def as_dict(self) -> dict[str, Any]:
        """As values that JSON can hold."""
        found = {"scale": self.scale, "good_steps": self.good_steps, "skipped": self.skipped}
        return found | ({"overflows": self.overflows} if self.overflows else {})

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> GuardState:
        """Back from there."""
        counts = (int(values.get(key, 0)) for key in ("skipped", "overflows"))
        return cls(float(values["scale"]), int(values["good_steps"]), 0, *counts)


@dataclass(frozen=True)
class Scaling:
    """How the loss scale follows the steps, as torch.amp.GradScaler's, from another beginning.

    And faster: of steps that overflow one behind the other the k-th, counted from 0, makes it
    2^(2^k) times smaller, so that five take it from where it begins to its least.

    Attributes:
        begin: the scale of a run's first step.
        growth_interval: good steps after which it doubles; a step skipped for its loss halves it.
        least, most: where it stops. All powers of two.
    """

    begin: float = 1024.0
    growth_interval: int = 2000
    least: float = 2.0**-14
    most: float = 2.0**24


def step_guard(
    program: Program, metrics: Tensor, *, scaling: Scaling | None, max_norm: float | None
) -> None:
    """Appends, behind `gradient_norm`: whether the step counts, and what the counts then are.

    A step counts where the sum of losses and the norm are finite, and it is not behind
    MOST_IN_A_ROW that weren't; those that a smaller scale may help are none of these. Where the
    loss is scaled, the norm and the factor that `gradient_norm` found without a scale become
    those of the true gradient.

    Args:
        metrics: [METRICS]: the sum of losses first, from STATE_AT on `gradient_norm`'s state with
            what `GuardState` keeps behind it. state[2] becomes 1 where the step counts, else 0.
        scaling: None where the loss is not scaled.
        max_norm: as `gradient_norm` has it.
    """
    check_shape("step_guard metrics", metrics, METRICS)
    constants: dict[str, Any] = {
        "state": STATE_AT,
        "most_in_a_row": GuardState.MOST_IN_A_ROW,
        "max_norm": max_norm,
        "scaling": None if scaling is None else vars(scaling),
    }
    program.dispatch("step_guard", constants, [metrics], 1)


def scaled_weight(
    program: Program, metrics: Tensor, weight: Tensor, scaled: Tensor, scaling: Scaling
) -> None:
    """Appends scaled[0] = weight · scale / scaling.begin.

    Args:
        metrics: as `step_guard` has it.
        weight: a uniform whose first word is an f32, with scaling.begin in it.
        scaled: [4].
    """
    check_shape("scaled_weight scaled", scaled, 4)
    constants = {"scale_at": STATE_AT + 4, "begin": scaling.begin}
    program.dispatch("scaled_weight", constants, [weight, metrics, scaled], 1)
