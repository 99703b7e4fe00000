"""What a checkpoint keeps of a session on its device: the adapter, moments, the loss scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lora.optim.guard import GuardState
from lora.shaders.errors import LoraError

if TYPE_CHECKING:
    from lora.shaders.memory import Arena
    from lora.training.activations import Activations
    from lora.training.adapter_state import AdapterState


class KeptState:
    """The part of `TrainingSession` that reads and writes it."""

    steps_done: int
    memory: Arena
    adapter: AdapterState
    _act: Activations

    def moments(self) -> dict[str, np.ndarray]:
        """What the optimizer keeps, by name: see `lora.optim.optimizers.OptimizerState`.

        Raises:
            LoraError: they hold what is no number.
        """
        tensors = self.adapter.optimizer.tensors
        found = {name: self.memory.read(tensor) for name, tensor in tensors.items()}
        for name, values in found.items():
            if not np.isfinite(values).all():
                raise LoraError(
                    f"The optimizer's {name} holds what is no finite number; it is not saved."
                )
        return found

    def guard(self) -> GuardState:
        """The loss scale and the counts of skipped steps, after all steps so far."""
        return GuardState.of_metrics(self.memory.read(self._act.metrics))

    def set_guard(self, guard: GuardState) -> None:
        """Puts them in place of the present ones."""
        values = self.memory.read(self._act.metrics)
        guard.put_into(values)
        self.memory.write(self._act.metrics, values)

    def restore(self, step: int, flat: np.ndarray, moments: Mapping[str, np.ndarray]) -> None:
        """Puts the state of a checkpoint in place of the present one; `stream` is set by itself.

        Args:
            step: that were done.
            flat: the adapter, f32 [layout.size].
            moments: as `moments` gives them.
        """
        self.steps_done = step
        self.memory.write(self.adapter.parameters, flat)
        for name, tensor in self.adapter.optimizer.tensors.items():
            self.memory.write(tensor, moments[name])
