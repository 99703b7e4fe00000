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
        overflows: tries of the step under way after which the scale fell: their loss was finite.
        held: whether the last of these tries waits to be run again; until then nothing counts, and
            nothing of this state changes.
        first_scale: of the step's first try.
    """

    scale: float = 1.0
    good_steps: int = 0
    in_a_row: int = 0
    skipped: int = 0
    overflows: int = 0
    held: bool = False
    first_scale: float = 1.0

    MOST_IN_A_ROW: ClassVar[int] = 3
    _PLACE: ClassVar[slice] = slice(STATE_AT + 4, STATE_AT + 11)

    @classmethod
    def of_metrics(cls, values: np.ndarray) -> GuardState:
        """Out of f32 [METRICS]."""
        scale, *counts, held, first = (float(value) for value in values[cls._PLACE])
        good_steps, in_a_row, skipped, overflows = map(int, counts)
        return cls(scale, good_steps, in_a_row, skipped, overflows, held != 0.0, first)

    def put_into(self, values: np.ndarray) -> None:
        """Writes it into f32 [METRICS]."""
        counts = self.good_steps, self.in_a_row, self.skipped, self.overflows
        values[self._PLACE] = [self.scale, *counts, float(self.held), self.first_scale]

    def as_dict(self) -> dict[str, Any]:
        """As values that JSON can hold: what stays between steps."""
        return {"scale": self.scale, "good_steps": self.good_steps, "skipped": self.skipped}

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> GuardState:
        """Back from there."""
        return cls(float(values["scale"]), int(values["good_steps"]), 0, int(values["skipped"]))


@dataclass(frozen=True)
class Scaling:
    """How the loss scale follows the steps, as torch.amp.GradScaler's, from another beginning.

    And no step is lost to it: one that overflows is held, and the host runs it again. Its k-th try,
    counted from 0, makes the scale 2^(2^k) times smaller, so that five take it from where a run
    begins to its least.

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
    MOST_IN_A_ROW that weren't. One that a smaller scale may help is held: neither it nor what comes
    behind it counts until it is begun `again` (`scaled_weight`). One that overflows at the least
    scale is skipped, and the scale is what it was before its tries. Where the loss is scaled, the
    norm and the factor that `gradient_norm` found without a scale become those of the true
    gradient.

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
    """Appends the begin of a step: scaled[0] = weight · scale / scaling.begin, and its tries.

    Args:
        metrics: as `step_guard` has it.
        weight: a uniform of f32: the weight, with scaling.begin in it; then whether this is the
            step that was held, run again (1), or another (0).
        scaled: [4].
    """
    check_shape("scaled_weight scaled", scaled, 4)
    constants = {"state": STATE_AT, "begin": scaling.begin}
    program.dispatch("scaled_weight", constants, [weight, metrics, scaled], 1)
