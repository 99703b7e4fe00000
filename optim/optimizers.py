"""The optimizers by the words of the config, and what each keeps from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lora.optim.adamw import AdamWSettings, AdamWTensors, adamw
from lora.optim.adamw_8bit import BLOCK, Moments8, adamw_8bit
from lora.optim.lion import LionTensors, lion
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

OPTIMIZERS = ("adamw", "adamw_8bit", "lion")
BLOCKS = {"adamw_8bit": BLOCK}  # parameters that share a scale, where some do


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer keeps of n parameters.

    Attributes:
        name: of OPTIMIZERS.
        tensors: by name, what a checkpoint holds: first_moment, but for lion second_moment, and
            with 8 bits scales.
        codes: of moments of 8 bits, what their codes stand for.
        rates: [⌈n / 64⌉], what the learning rate of each 64 parameters is multiplied by; None for
            one rate.
    """

    name: str
    tensors: Mapping[str, Tensor]
    codes: Tensor | None = None
    rates: Tensor | None = None

    @classmethod
    def allocate(
        cls, recording: Recording, name: str, n: int, rates: np.ndarray | None = None
    ) -> OptimizerState:
        """Of moments that are zero.

        Raises:
            ValueError: there is no such optimizer.
        """
        if name not in OPTIMIZERS:
            raise ValueError(f"optimizer {name!r} is none of {', '.join(OPTIMIZERS)}")
        given = None
        if rates is not None:
            given = recording.memory.upload(rates, purpose="optimizer")

        def flat() -> Tensor:
            return recording.memory.empty_flat(n, purpose="optimizer")

        if name == "adamw_8bit":
            moments = Moments8.allocate(recording, n)
            tensors = {
                "first_moment": moments.first,
                "second_moment": moments.second,
                "scales": moments.scales,
            }
            return cls(name, tensors, moments.codes, given)
        tensors = {"first_moment": flat()}
        if name == "adamw":
            tensors["second_moment"] = flat()
        return cls(name, tensors, None, given)

    def record(
        self,
        program: Program,
        flat: tuple[Tensor, Tensor],
        state: Tensor,
        step: Tensor,
        settings: AdamWSettings,
    ) -> None:
        """Appends one step.

        Args:
            flat: parameters and gradient, [n].
            state, step: as of `lora.optim.adamw.adamw`.
            settings: epsilon is not lion's.
        """
        first = self.tensors["first_moment"]
        if self.name == "lion":
            tensors = LionTensors(*flat, first, self.rates)
            lion(program, tensors, state, step, settings.betas, settings.weight_decay)
            return
        second = self.tensors["second_moment"]
        if self.codes is None:
            adamw(program, AdamWTensors(*flat, first, second, self.rates), state, step, settings)
            return
        moments = Moments8(first, second, self.tensors["scales"], self.codes)
        adamw_8bit(program, *flat, moments, (state, step), settings, rates=self.rates)
