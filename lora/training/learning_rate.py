"""The rate of the next step: the schedule's, or a script's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora.optim.schedule import learning_rate
from lora.shaders.errors import InputError
from lora.shaders.untrusted import F32_MOST

if TYPE_CHECKING:
    from lora.config.schema import Config


class LearningRate:
    """The part of `TrainingSession` that knows it."""

    config: Config
    steps_done: int
    total_steps: int
    warmup_steps: int
    _own_rate: float | None = None

    @property
    def learning_rate(self) -> float:
        """Of the next step: what the schedule says, or what was set.

        Setting it takes the place of the schedule for all steps from there on; None goes back to
        the schedule. A checkpoint doesn't keep it.

        Example:
            >>> session.learning_rate = 1e-5
            >>> session.learning_rate = None  # as the config says

        Raises:
            InputError: what is set is no number of at least 0.
        """
        if self._own_rate is not None:
            return self._own_rate
        train = self.config.train
        return learning_rate(
            self.steps_done,
            total_steps=self.total_steps,
            peak=train.learning_rate,
            schedule=train.schedule,
            warmup_steps=self.warmup_steps,
            options=train.schedule_kwargs,
        )

    @learning_rate.setter
    def learning_rate(self, rate: float | None) -> None:
        if rate is not None and not 0 <= rate <= F32_MOST:
            raise InputError(
                f"session.learning_rate: got {rate!r}; a number of at least 0, or None."
            )
        self._own_rate = None if rate is None else float(rate)
