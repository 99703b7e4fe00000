"""Losses: what each trained token counts in the gradient, found on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lora.forward.model.inputs import Inputs
from lora.shaders.activations import check_shape
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

LANES = 64  # of a workgroup


@dataclass(frozen=True)
class LossTensors:
    """What a loss is recorded with.

    Attributes:
        inputs: of the micro-batch: labels, bounds of its examples, how many targets are in use.
        losses: [targets], −log-probability of each label; there for a loss that reads it.
        weights: [targets], to be written: the derivative of the loss by each of `losses`.
        scale: a uniform whose first word is the f32 loss_scale / (trained tokens of the optimizer
            step). The gradient is right where the weights are proportional to it.
    """

    inputs: Inputs
    losses: Tensor
    weights: Tensor
    scale: Tensor

    @classmethod
    def allocate(cls, recording: Recording, inputs: Inputs, losses: Tensor) -> LossTensors:
        """With new weights and a new uniform."""
        weights = recording.memory.empty((inputs.targets.maximum,), extent=inputs.targets)
        return cls(inputs, losses, weights, recording.memory.uniform())


class Loss(Protocol):
    """A program between the log-probabilities and their gradient.

    Attributes:
        reads_losses: whether it needs the log-probabilities of all targets of the micro-batch.
            Where the head's logits come in several chunks they are then computed twice.
    """

    reads_losses: bool

    def record(self, program: Program, tensors: LossTensors) -> None:
        """Appends what writes `tensors.weights` for the targets in use."""


class SupervisedLoss:
    """The mean cross-entropy over the trained tokens of an optimizer step: equal weights."""

    reads_losses = False

    def record(self, program: Program, tensors: LossTensors) -> None:
        """See `Loss`."""
        loss_weights(program, tensors.scale, tensors.weights)


def loss_weights(program: Program, scale: Tensor, weights: Tensor) -> None:
    """Appends weights[m] = scale for the rows in use.

    Args:
        scale: a uniform whose first word is an f32.
        weights: [rows] with an extent.
    """
    if weights.extent is None:
        raise ValueError("loss_weights: the weights need an extent")
    rows = weights.extent.maximum
    check_shape("loss_weights weights", weights, rows)
    tensors = [weights.extent.uniform, scale, weights]
    program.dispatch("loss_weights", {"lanes": LANES}, tensors, -(-rows // LANES))
