"""The optimizer's step on the device, recorded, and random gradients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora.checks.references.optim import BETAS, EPSILON
from lora.optim.adamw import AdamWSettings, AdamWTensors, adamw, step_words
from lora.optim.clipping import gradient_norm
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor


def padded(n: int) -> int:
    """n, rounded up to the multiple of 64 that the flat layout has."""
    return -(-n // 64) * 64


def few_ranges(n: int, max_range: int | None) -> int | None:
    """max_range, or what cuts n into four: each range's sum of squares is a kernel of its own."""
    return max_range and max(max_range, n // 3)


@dataclass(frozen=True)
class Optimizer:
    """A recorded optimizer step and its tensors."""

    recording: Recording
    program: Program
    parameters: Tensor
    gradients: list[Tensor]
    first_moment: Tensor
    second_moment: Tensor
    state: Tensor
    words: Tensor

    @classmethod
    def record(
        cls,
        recording: Recording,
        parameters: np.ndarray,
        n_slices: int,
        *,
        max_norm: float | None = None,
        loss_scale: float = 1.0,
        weight_decay: float = 0.0,
        max_range: int | None = None,
    ) -> Optimizer:
        """The step over parameters [n], n a multiple of 64."""
        n = parameters.size
        o = cls(
            recording,
            Program(recording),
            recording.memory.upload(parameters),
            [recording.memory.empty((n,)) for _ in range(n_slices)],
            recording.memory.empty((n,)),
            recording.memory.empty((n,)),
            recording.memory.empty((4,)),
            recording.memory.uniform(),
        )
        gradient_norm(
            o.program,
            o.gradients,
            o.state,
            max_norm=max_norm,
            loss_scale=loss_scale,
            max_range=max_range,
        )
        adamw(
            o.program,
            AdamWTensors(o.parameters, o.gradients[0], o.first_moment, o.second_moment),
            o.state,
            o.words,
            AdamWSettings(BETAS, EPSILON, weight_decay),
            max_range=max_range,
        )
        return o

    def step(self, slices: list[np.ndarray], learning_rate: float, t: int) -> None:
        """Runs step t (from 1) with these slices of the gradient."""
        for tensor, values in zip(self.gradients, slices, strict=True):
            self.recording.memory.write(tensor, values)
        self.recording.memory.write(self.words, step_words(learning_rate, t, BETAS))
        self.program.run()

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Parameters and both moments."""
        tensors = (self.parameters, self.first_moment, self.second_moment)
        p, m, v = (self.recording.memory.read(t) for t in tensors)
        return p, m, v


def random_slices(rng: np.random.Generator, n: int, n_slices: int) -> list[np.ndarray]:
    """Slices [padded(n)] of a gradient whose padding is zero."""
    slices = [np.zeros(padded(n), np.float32) for _ in range(n_slices)]
    for values in slices:
        values[:n] = rng.normal(size=n)
    return slices
