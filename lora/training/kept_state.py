"""What a checkpoint keeps of a session on its device: the adapter, moments, the loss scale.

Who reads or changes these waits for steps that have to run again (`lora.training.under_way`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora.adapters.files import load_adapter
from lora.optim.guard import GuardState
from lora.shaders.errors import LoraError

if TYPE_CHECKING:
    from lora.forward.model.adapter import AdapterLayout
    from lora.shaders.memory import Arena
    from lora.training.activations import Activations
    from lora.training.adapter_state import AdapterState
    from lora.training.device_state import SessionPrograms
    from lora.training.orders import Orders
    from lora.training.under_way import StepsUnderWay


class KeptState:
    """The part of `TrainingSession` that reads and writes it."""

    steps_done: int
    memory: Arena
    adapter: AdapterState
    layout: AdapterLayout
    orders: Orders
    _act: Activations
    _initial: np.ndarray
    _programs: SessionPrograms
    _under_way: StepsUnderWay

    def settle(self) -> None:
        """Runs again what the loss scale was too large for, so that all steps so far have counted.

        Under f16 that waits for the device; where no loss is scaled there is nothing to do. All
        processes call it.
        """
        training = self._programs.training
        if training is not None and training.scaling and self._under_way.held_at_rest():
            self.orders.give("again")
            self._under_way.settle()

    def run_again(self) -> None:
        """The part of `settle` that rank 0 has the others do."""
        self._under_way.settle()

    def leave_steps(self) -> None:
        """Has no step run again any more: the processes do nothing together any longer."""
        self._under_way.leave()

    def parameters(self) -> np.ndarray:
        """The adapter, f32 [layout.size], after all steps so far."""
        self.settle()
        return self.memory.read(self.adapter.parameters)

    def set_parameters(self, flat: np.ndarray) -> None:
        """Puts an adapter in place of the present one.

        Args:
            flat: as `parameters` gives it, f32 [layout.size].

        Raises:
            ValueError: it has another size.
        """
        if flat.shape != (self.layout.size,):
            raise ValueError(f"got parameters of shape {flat.shape}, not ({self.layout.size},)")
        values = flat.astype(np.float32, copy=False)
        self.settle()
        self.orders.give("load", values)
        self.memory.write(self.adapter.parameters, values)

    def load_adapter(self, path: str | Path) -> None:
        """Puts an adapter of the config's rank and targets in place of the present one.

        Args:
            path: a PEFT adapter directory, or a GGUF adapter.
        """
        self.settle()
        self._initial = load_adapter(Path(path), self.layout)
        self.orders.give("load", self._initial)
        self.memory.write(self.adapter.parameters, self._initial)

    def moments(self) -> dict[str, np.ndarray]:
        """What the optimizer keeps, by name: see `lora.optim.optimizers.OptimizerState`.

        Raises:
            LoraError: they hold what is no number.
        """
        self.settle()
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
        self.settle()
        return GuardState.of_metrics(self.memory.read(self._act.metrics))

    def set_guard(self, guard: GuardState) -> None:
        """Puts them in place of the present ones."""
        self.settle()
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
        self.settle()
        self.steps_done = step
        self.memory.write(self.adapter.parameters, flat)
        for name, tensor in self.adapter.optimizer.tensors.items():
            self.memory.write(tensor, moments[name])
