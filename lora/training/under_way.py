"""Steps that the device was given and whose results are not there yet: some of them run again.

Under f16 the gradients of a step may overflow for the loss scale. The device then makes the scale
smaller and holds: that step and all behind it change nothing (`lora.optim.guard.step_guard`). Its
result comes as late as any other; once it is there the host gives the device the same steps again,
from the one that was held on, with the micro-batches, masks, rates and numbers that they had. So
nobody waits for a step that needs no second try, and none is lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lora.data.batches import Batch
from lora.optim.guard import GuardState
from lora.shaders.errors import LoraError
from lora.shaders.readback import ReadbackRing
from lora.shaders.tensor import Tensor
from lora.training.exchange import StepOfRanks
from lora.training.metrics import Metrics, MetricsAtArrival


@dataclass
class Step:
    """All that the device needs to run an optimizer step, once or again.

    Attributes:
        number: counted from 1.
        epoch: passes over the data, this step included.
        learning_rate: of the optimizer.
        tokens, trained_tokens: of all processes.
        batches: this process's micro-batches.
        tries: that came to nothing, since the loss scale was too large.
    """

    number: int
    epoch: float
    learning_rate: float
    tokens: int
    trained_tokens: int
    batches: Sequence[Batch]
    tries: int = 0


class StepsUnderWay:
    """Gives a device steps, and takes what they came to, in their order.

    Of several processes all hold at the same step, since all have the same sums; all call
    `run_again` or `settle` at the same place of what they do together.

    Args:
        ring: on which results come.
        metrics: [METRICS], in which the device writes them.
        run: has the device compute a step; returns how the processes fared, where there are
            several. Where it has tries behind it, the device is to go on with it.
    """

    def __init__(
        self, ring: ReadbackRing, metrics: Tensor, run: Callable[[Step], StepOfRanks | None]
    ) -> None:
        self._ring, self._metrics, self._run = ring, metrics, run
        self._pending: deque[Step] = deque()
        self._finished: list[Metrics] = []
        self._held = self._left = False
        self._running_again = False  # and whatever ended that left steps out

    def begin(self, step: Step) -> None:
        """Gives the device one more; returns without waiting for it."""
        self._submit(step)
        self._pending.append(step)

    @property
    def held(self) -> bool:
        """Whether a step waits to be run again, as far as results are there."""
        self._arrived(wait=False)
        return self._held and not self._left

    def run_again(self) -> None:
        """Runs the step that is held until it isn't, then gives the device those behind it.

        Raises:
            LoraError: none is held here: this process's device is not at one with another's.
        """
        self._arrived(wait=True)
        if not self._held:
            raise LoraError(
                "The device of another process found a gradient that is not finite, and this one's "
                "did not, in the same sum: one of them computes wrongly."
            )
        again, self._running_again = list(self._pending), True
        while self._held:
            again[0].tries += 1
            self._held = False
            self._submit(again[0])
            self._arrived(wait=True)
        for step in again[1:]:
            self._submit(step)
        self._running_again = False

    def settle(self) -> None:
        """As `run_again`, until the device has nothing to do and holds nothing."""
        self.run_again()
        while self.held_at_rest():
            self.run_again()

    def held_at_rest(self) -> bool:
        """Waits for all results: whether a step waits to be run again then.

        Raises:
            LoraError: an error ended `run_again`: some of the steps that were done did not count.
        """
        if self._running_again:
            raise LoraError("Steps that were to be run again were not: what is there lacks them.")
        self._arrived(wait=True)
        return self._held and not self._left

    def leave(self) -> None:
        """Has no step run again any more: the processes do nothing together any longer."""
        self._left = True

    def finished(self, *, wait: bool = False) -> list[Metrics]:
        """Of the steps that counted, or were skipped, since the last call; with `wait`, of all."""
        self._arrived(wait=wait)
        found, self._finished = self._finished, []
        return found

    def _submit(self, step: Step) -> None:
        ranks = self._run(step)
        metrics = MetricsAtArrival(
            step=step.number,
            epoch=step.epoch,
            learning_rate=step.learning_rate,
            tokens=step.tokens,
            trained_tokens=step.trained_tokens,
            ranks=ranks,
            retried=step.tries,
        )

        def convert(values: np.ndarray) -> tuple[bool, Metrics]:
            return GuardState.of_metrics(values).held, metrics(values)

        self._ring.push(self._metrics, convert)

    def _arrived(self, *, wait: bool) -> None:
        for held, metrics in self._ring.ready(wait=wait):
            if held:  # as all behind it are
                self._held = True
            else:
                self._pending.popleft()
                self._finished.append(metrics)
