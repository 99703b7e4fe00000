"""AdamW on the device (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora.optim.clipping import flat_ranges
from lora.shaders.activations import check_shape
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor

LANES = 256  # of a workgroup; each takes four parameters
RATED = 64  # neighbouring parameters that have one rate
RATES_UNIT = 64 * RATED  # parameters whose rates begin on 256 bytes
_SMALLEST = float(np.finfo(np.float32).tiny)


def step_words(learning_rate: float, step: int, betas: tuple[float, float]) -> np.ndarray:
    """What changes from step to step, for the uniform that `adamw` reads.

    Args:
        learning_rate: of this step.
        step: counted from 1, as in PyTorch.
        betas: β1, β2.

    Returns:
        u32 [4]: the bits of f32 learning_rate, 1 − β1^step, 1 − β2^step (found in float64), 0.
    """
    if step < 1:
        raise ValueError(f"AdamW's steps are counted from 1, not from {step}")
    values = [learning_rate, 1.0 - betas[0] ** step, 1.0 - betas[1] ** step, 0.0]
    # A rate beyond f32 is its largest number: an infinite one would make 0 · ∞ of a zero.
    largest = float(np.finfo(np.float32).max)
    return np.minimum(np.array(values, np.float64), largest).astype(np.float32).view(np.uint32)


@dataclass(frozen=True)
class AdamWSettings:
    """What stays the same in all steps.

    Attributes:
        epsilon: positive in f32; a padding element, always 0 with gradient 0, then stays exactly 0.
    """

    betas: tuple[float, float]
    epsilon: float
    weight_decay: float


@dataclass(frozen=True)
class AdamWTensors:
    """Flat tensors [n], n a multiple of 4; all but the gradient are updated in place.

    Attributes:
        gradient: before clipping.
        rates: [⌈n / 64⌉], what the learning rate of each 64 parameters is multiplied by; None for
            one rate.
    """

    parameters: Tensor
    gradient: Tensor
    first_moment: Tensor
    second_moment: Tensor
    rates: Tensor | None = None


def adamw(
    program: Program,
    tensors: AdamWTensors,
    state: Tensor,
    step: Tensor,
    settings: AdamWSettings,
    *,
    max_range: int | None = None,
) -> None:
    """Appends one AdamW step over flat tensors [n], as torch.optim.AdamW does it.

    Args:
        state: [4 or more] from `gradient_norm`: its factor is applied; where the norm was not
            finite nothing changes. A parameter that would become infinite is f32's largest.
        step: a uniform that holds `step_words`.
        max_range: elements of one binding at most; by default what the device can bind.
    """
    flat = (
        tensors.parameters, tensors.gradient, tensors.first_moment, tensors.second_moment,
    )  # fmt: skip
    (n,) = tensors.parameters.shape
    for tensor in flat:
        check_shape("adamw", tensor, n)
    if n % 4:
        raise ValueError(f"adamw: {n} parameters are no multiple of 4")
    if not settings.epsilon >= _SMALLEST:
        raise ValueError(
            f"adamw: an epsilon of {settings.epsilon} is 0 in f32, and 0 / 0 would follow"
        )
    rates = tensors.rates
    check_rates("adamw", rates, n)
    largest = max_range or program.recording.facts.max_binding // 4
    for start, stop in flat_ranges(n, largest, 64 if rates is None else RATES_UNIT):
        constants = {
            "lanes": LANES,
            "n": stop - start,
            "rates": rates is not None,
            "beta1": settings.betas[0],
            "beta2": settings.betas[1],
            "epsilon": settings.epsilon,
            "weight_decay": settings.weight_decay,
        }
        ranges = [tensor.slice(start, stop) for tensor in flat]
        program.dispatch(
            "adamw",
            constants,
            [step, state, *ranges, *rates_of(rates, start, stop)],
            -(-(stop - start) // (4 * LANES)),
        )


def check_rates(name: str, rates: Tensor | None, n: int) -> None:
    """Refuses rates of another number of parameters."""
    if rates is not None:
        check_shape(f"{name} rates", rates, -(-n // RATED))


def rates_of(rates: Tensor | None, start: int, stop: int) -> list[Tensor]:
    """Those of parameters start to stop, where there are any."""
    return [] if rates is None else [rates.slice(start // RATED, -(-stop // RATED))]
