"""AdamW with moments of 8 bits (Dettmers et al. 2022, "8-bit Optimizers via Block-wise …")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora.optim.adamw import AdamWSettings, check_rates, rates_of
from lora.optim.clipping import flat_ranges
from lora.shaders.activations import check_shape
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

BLOCK = 256  # numbers that share a scale
_UNIT = 32 * BLOCK  # parameters whose scales begin on 256 bytes
GPU_LANES, CPU_LANES = 256, 64  # of a workgroup: 64 a block


def dynamic_codes(*, signed: bool) -> np.ndarray:
    """The values of 256 codes, f32, ascending: bitsandbytes' create_dynamic_map.

    Seven decades with a power of two of values in each, more of them the larger they are; 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        n = 2**decade if signed else 2 ** (decade + 1)
        edges = np.linspace(0.1, 1.0, n + 1)
        means = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2.0
        values += [*means, *(-means if signed else ())]
    return np.sort(np.array(values, np.float64)).astype(np.float32)


@dataclass(frozen=True)
class Moments8:
    """Both moments of n parameters.

    Attributes:
        first, second: u32 [n / 4], four codes a word.
        scales: [⌈n / BLOCK⌉, 2], of the first and the second.
        codes: [512], what their codes stand for.
    """

    first: Tensor
    second: Tensor
    scales: Tensor
    codes: Tensor

    @classmethod
    def allocate(cls, recording: Recording, n: int) -> Moments8:
        """Zeros."""
        memory = recording.memory
        zeros = {
            signed: int(np.searchsorted(dynamic_codes(signed=signed), 0.0))
            for signed in (True, False)
        }

        def moment(signed: bool) -> Tensor:
            words = np.full(n // 4, zeros[signed] * 0x01010101, np.uint32)
            return memory.upload(words, purpose="optimizer")

        codes = np.concatenate([dynamic_codes(signed=True), dynamic_codes(signed=False)])
        return cls(
            moment(True),
            moment(False),
            memory.empty((-(-n // BLOCK), 2), purpose="optimizer"),
            memory.upload(codes, purpose="optimizer"),
        )


def adamw_8bit(
    program: Program,
    parameters: Tensor,
    gradient: Tensor,
    moments: Moments8,
    uniforms: tuple[Tensor, Tensor],
    settings: AdamWSettings,
    *,
    rates: Tensor | None = None,
    max_range: int | None = None,
) -> None:
    """Appends one step of AdamW over flat tensors [n], n a multiple of 64.

    All is quantized in blocks, where bitsandbytes leaves tensors below 4,096 numbers in f32.

    Args:
        parameters, gradient, rates: as of `lora.optim.adamw.AdamWTensors`.
        uniforms: state and step, as of `lora.optim.adamw.adamw`.
        max_range: elements of one binding at most; by default what the device can bind.
    """
    (n,) = parameters.shape
    state, step = uniforms
    check_shape("adamw_8bit gradient", gradient, n)
    for tensor in (moments.first, moments.second):
        check_shape("adamw_8bit moment", tensor, n // 4)
    check_shape("adamw_8bit scales", moments.scales, -(-n // BLOCK), 2)
    if n % 64:
        raise ValueError(f"adamw_8bit: {n} parameters are no multiple of 64")
    check_rates("adamw_8bit", rates, n)
    largest = max_range or program.recording.facts.max_binding // 4
    lanes = CPU_LANES if program.recording.facts.is_cpu else GPU_LANES
    for start, stop in flat_ranges(n, largest, _UNIT):
        blocks = slice(start // BLOCK, -(-stop // BLOCK))
        program.dispatch(
            "adamw_8bit",
            {
                "n": stop - start,
                "lanes": lanes,
                "rates": rates is not None,
                "beta1": settings.betas[0],
                "beta2": settings.betas[1],
                "epsilon": settings.epsilon,
                "weight_decay": settings.weight_decay,
            },
            [
                step, state, parameters.slice(start, stop), gradient.slice(start, stop),
                moments.first.slice(start // 4, stop // 4),
                moments.second.slice(start // 4, stop // 4),
                moments.scales.slice(blocks.start, blocks.stop), moments.codes,
                *rates_of(rates, start, stop),
            ],
            -(-(stop - start) // (4 * lanes)),
        )  # fmt: skip
