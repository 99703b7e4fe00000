"""The trainable parameters and all that belongs to them, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora.backward.lora import MAX_SLICES
from lora.forward.dora import Dora
from lora.forward.model.adapter import AdapterLayout
from lora.forward.model.factors import Factors
from lora.forward.model.trained_tokens import TokenIndex
from lora.optim.optimizers import OptimizerState
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

SLICED_SIZE = 24 << 20  # parameters of all slices of the gradients together


@dataclass(frozen=True)
class AdapterState:
    """The trainable parameters and all that belongs to them, flat f32 tensors [layout.size]."""

    parameters: Tensor
    gradients: tuple[Tensor, ...]  # slices that are summed by the optimizer
    optimizer: OptimizerState
    dora: Dora | None = None
    tokens: TokenIndex | None = None  # where some are trained

    def factors(self, layout: AdapterLayout) -> Factors:
        """The factors of the adapter as programs take them."""
        if self.dora is not None:
            return self.dora.factors
        return layout.factors(self.parameters, self.tokens)

    @classmethod
    def allocate(
        cls,
        recording: Recording,
        layout: AdapterLayout,
        most_slices: int = MAX_SLICES,
        optimizer: str = "adamw",
        b_rate: float | None = None,
    ) -> AdapterState:
        """Zeroed tensors. On a GPU slices: that many workgroups more for each gradient.

        Large adapters make enough workgroups by themselves.

        Args:
            most_slices: of the gradient.
            optimizer: its name.
            b_rate: what the learning rate of all B is multiplied by (Hayou et al. 2024, "LoRA+").
        """
        layout.check_bindings(recording.facts)

        most = max(1, min(most_slices, SLICED_SIZE // layout.size))
        n_slices = 1 if recording.facts.is_cpu else most

        rates = None
        if b_rate is not None:
            rates = np.where(layout.b_blocks(), b_rate, 1.0).astype(np.float32)

        def flat(purpose: str) -> Tensor:
            return recording.memory.empty_flat(layout.size, purpose=purpose)

        return cls(
            parameters=flat("adapter"),
            gradients=tuple(flat("gradients") for _ in range(n_slices)),
            optimizer=OptimizerState.allocate(recording, optimizer, layout.size, rates),
            tokens=layout.token_index(recording),
        )


def factors_of(layout: AdapterLayout, adapter: Tensor | AdapterState | None) -> Factors:
    """The factors of an adapter, or of its parameters alone; none of None.

    Raises:
        ValueError: the parameters alone are not all of it.
    """
    if isinstance(adapter, AdapterState):
        return adapter.factors(layout)
    if adapter is not None and layout.tokens:
        raise ValueError("an adapter with trained tokens is more than its parameters")
    return Factors() if adapter is None else layout.factors(adapter)
