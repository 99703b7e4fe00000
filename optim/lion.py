"""Lion on the device (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms")."""

from __future__ import annotations

from dataclasses import dataclass

from lora.optim.adamw import LANES, RATES_UNIT, check_rates, rates_of
from lora.optim.clipping import flat_ranges
from lora.shaders.activations import check_shape
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


@dataclass(frozen=True)
class LionTensors:
    """Flat tensors [n], n a multiple of 4, as of `AdamWTensors`."""

    parameters: Tensor
    gradient: Tensor
    first_moment: Tensor
    rates: Tensor | None = None


def lion(
    program: Program,
    tensors: LionTensors,
    state: Tensor,
    step: Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    *,
    max_range: int | None = None,
) -> None:
    """Appends one step of Lion over flat tensors [n].

    Args:
        state, step: as of `lora.optim.adamw.adamw`.
        max_range: elements of one binding at most; by default what the device can bind.
    """
    flat = (tensors.parameters, tensors.gradient, tensors.first_moment)
    (n,) = tensors.parameters.shape
    for tensor in flat:
        check_shape("lion", tensor, n)
    if n % 4:
        raise ValueError(f"lion: {n} parameters are no multiple of 4")
    rates = tensors.rates
    check_rates("lion", rates, n)
    largest = max_range or program.recording.facts.max_binding // 4
    for start, stop in flat_ranges(n, largest, 64 if rates is None else RATES_UNIT):
        constants = {
            "lanes": LANES,
            "n": stop - start,
            "rates": rates is not None,
            "beta1": betas[0],
            "beta2": betas[1],
            "weight_decay": weight_decay,
        }
        ranges = [tensor.slice(start, stop) for tensor in flat]
        program.dispatch(
            "lion",
            constants,
            [step, state, *ranges, *rates_of(rates, start, stop)],
            -(-(stop - start) // (4 * LANES)),
        )
