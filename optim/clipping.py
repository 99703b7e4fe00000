"""The global gradient norm and its clip factor, found on the device in a fixed order."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora.shaders.activations import check_shape
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor

MAX_SLICES = 4  # with the partial sums, five of the eight storage buffers that every device binds
_PARTIALS = 1024  # partial sums of squares: short enough sums for f32, few enough for one workgroup
GPU_LANES, CPU_LANES = 256, 8  # of a workgroup


def flat_ranges(n: int, max_range: int, unit: int = 64) -> list[tuple[int, int]]:
    """Cuts [0, n) into stretches of at most `max_range` elements that begin on 256 bytes.

    Args:
        unit: what they begin on a multiple of, where tensors with one value for several elements
            are cut with them; it may be more than max_range.
    """
    step = max(unit, max_range // unit * unit)
    return [(start, min(start + step, n)) for start in range(0, n, step)]


def sum_slices(
    program: Program, gradients: Sequence[Tensor], *, max_range: int | None = None
) -> Tensor:
    """Appends: slices summed into the first, in their order.

    Args:
        gradients: one to four slices [n], n a multiple of 4; the first holds their sum afterwards.
        max_range: elements of one binding at most; by default what the device can bind.

    Returns:
        What `gradient_norm` needs, too: [n_partials], sums of squares of stretches of the sum.
    """
    if not 1 <= len(gradients) <= MAX_SLICES:
        raise ValueError(f"gradient_norm: {len(gradients)} slices, expected 1 to {MAX_SLICES}")
    (n,) = gradients[0].shape
    for gradient in gradients:
        check_shape("gradient slice", gradient, n)
    if n % 4:
        raise ValueError(f"gradient_norm: {n} parameters are no multiple of 4")
    lanes = _lanes(program)
    ranges = flat_ranges(n, max_range or program.recording.facts.max_binding // 4)
    groups = [min(_PARTIALS, -(-(stop - start) // (4 * lanes))) for start, stop in ranges]
    partial = program.recording.memory.empty((sum(groups),), purpose="optimizer")
    for index, (start, stop) in enumerate(ranges):
        stretch = -(-(stop - start) // (4 * groups[index]))  # quads
        program.dispatch(
            "gradient_squares",
            {
                "lanes": lanes,
                "n_slices": len(gradients),
                "n": stop - start,
                "stretch": stretch,
                "first_partial": sum(groups[:index]),
            },
            [partial, *(g.slice(start, stop) for g in gradients)],
            (groups[index], 1, 1),
        )
    return partial


def _lanes(program: Program) -> int:
    return CPU_LANES if program.recording.facts.is_cpu else GPU_LANES


def gradient_norm(
    program: Program,
    gradients: Sequence[Tensor],
    state: Tensor,
    *,
    max_norm: float | None,
    loss_scale: float = 1.0,
    max_range: int | None = None,
) -> None:
    """Appends: slices summed into the first, the norm of the whole, and the clip factor.

    Clipping as torch.nn.utils.clip_grad_norm_: factor = min(1, max_norm / (norm + 1e-6)). The
    slices are added in their order, and the squares in a fixed order. Where the loss was scaled,
    the norm is that of the true gradient, and the factor takes the scale out of the one in the
    buffer; a power of two changes no bit of what `adamw` applies.

    Args:
        gradients: one to four slices [n], n a multiple of 4; the first holds their sum afterwards.
        state: [4 or more], written: norm before clipping, factor of the slices' sum, 1 where the
            norm is finite in f32 else 0, 0.
        max_norm: of the true gradient; None for no clipping (factor 1 / loss_scale).
        loss_scale: what all slices are too large by, finite and positive.
        max_range: elements of one binding at most; by default what the device can bind.
    """
    if max_norm is not None and not 0.0 < max_norm < math.inf:
        raise ValueError(f"gradient_norm: a max_norm of {max_norm}; None means no clipping")
    if not 0.0 < loss_scale < math.inf:
        raise ValueError(f"gradient_norm: a loss_scale of {loss_scale}; 1 means none")
    lanes = _lanes(program)
    partial = sum_slices(program, gradients, max_range=max_range)
    program.dispatch(
        "gradient_norm",
        {
            "lanes": lanes,
            "n_partials": partial.size,
            "max_norm": max_norm,
            "loss_scale": loss_scale,
        },
        [partial, state],
        1,
    )
