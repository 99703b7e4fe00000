"""Kernels of causal convolutions."""

from __future__ import annotations

from functools import partial

import numpy as np

from lora.backward.causal_conv import causal_conv_backward
from lora.checks.comparison import Check, Comparison, compare, needs_half, same, untouched, worst
from lora.checks.references.causal_conv import (
    causal_conv_backward_reference,
    causal_conv_reference,
    conv_state_reference,
)
from lora.checks.tensors import (
    MARKER,
    activation,
    extent_in_use,
    normal,
    rounded,
    typed,
    typed_marked,
)
from lora.forward.causal_conv import Convolution, causal_conv, causal_conv_text
from lora.shaders.program import Program
from lora.shaders.recording import Recording

STARTS = (0, 1, 3, 4, 17, 21)  # of examples, some shorter than the taps
ROWS, WIDTH = 23, 20


def _segments(starts: tuple[int, ...], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows' segments u32 [rows, 2], of those in use, and their examples' first rows."""
    bounds = np.zeros((rows, 2), np.uint32)
    for first, end in zip(starts[:-1], starts[1:], strict=True):
        bounds[first:end] = first, end
    return bounds, bounds[: starts[-1], 0].astype(int)


def check_causal_conv(
    recording: Recording, gated: bool, taps: int, dtype: str, backward: bool = False
) -> Comparison:
    """Sums of a few products of numbers up to 20; the other columns of a row are left alone.

    Backward, what a gated one gave is written again.
    """
    if dtype == "f16":
        needs_half(recording)
    stride = 3 * WIDTH if gated else WIDTH + 8
    x, weight = rounded(normal(1, ROWS, stride), dtype), 0.5 * normal(2, taps, WIDTH)
    d_y, (bounds, starts) = rounded(normal(3, ROWS, WIDTH), dtype), _segments(STARTS, ROWS)
    in_use = STARTS[-1]
    extent, program = extent_in_use(recording, ROWS, in_use), Program(recording)
    source, segments = typed(recording, x, dtype, extent), activation(recording, bounds, extent)
    convolution = Convolution(recording.memory.upload(weight), gated)
    y, expected = typed_marked(recording, dtype, extent, WIDTH), np.full((ROWS, WIDTH), MARKER)
    expected[:in_use] = causal_conv_reference(x[:in_use], weight, starts, gated)
    found = [(y, expected)] if gated or not backward else []
    if backward:
        given = typed(recording, d_y, dtype, extent)
        d_x = typed_marked(recording, dtype, extent, stride)
        again = y if gated else None
        causal_conv_backward(program, source, convolution, segments, given, d_x, y=again)
        expected = np.full((ROWS, stride), MARKER)
        gradient = causal_conv_backward_reference(x[:in_use], weight, starts, gated, d_y[:in_use])
        written = stride if gated else WIDTH
        expected[:in_use, :written] = gradient[:, :written]
        found.append((d_x, expected))
    else:
        causal_conv(program, source, convolution, segments, y)
    program.run()
    results = [(recording.memory.read(tensor), expected) for tensor, expected in found]
    return worst(
        *(compare(result, expected, rtol=4e-6, atol=1e-5) for result, expected in results),
        *(untouched(result[in_use:]) for result, _ in results),
    )


def check_causal_conv_text(
    recording: Recording, gated: bool, rows: int, position: int, taps: int = 4
) -> Comparison:
    """As above; what is left for later rows is a product, rounded once."""
    stride = 3 * WIDTH if gated else WIDTH
    x, weight = normal(1, rows + 2, stride), 0.5 * normal(2, taps, WIDTH)
    before = normal(4, taps - 1, WIDTH)
    extent, program = extent_in_use(recording, rows + 2, rows), Program(recording)
    places = np.arange(position, position + rows + 2, dtype=np.uint32)
    source, positions = (activation(recording, values, extent) for values in (x, places))
    state = recording.memory.upload(before)
    out = typed_marked(recording, "f32", extent, WIDTH)
    convolution = Convolution(recording.memory.upload(weight), gated)
    causal_conv_text(program, source, convolution, positions, state, out)
    program.run()
    known = before if position else None
    starts = np.zeros(rows, int)
    expected = causal_conv_reference(x[:rows], weight, starts, gated, known)
    result = recording.memory.read(out)
    left = conv_state_reference(x[:rows], taps, WIDTH, gated, known)
    return worst(
        compare(result[:rows], expected, rtol=4e-6, atol=1e-5),
        untouched(result[rows:]),
        compare(recording.memory.read(state), left, rtol=1e-6) if gated
        else same(recording.memory.read(state), left),
    )  # fmt: skip


CHECKS = [
    *(
        Check(f"causal_conv{'_backward' if backward else ''}",
              f"{ROWS}x{WIDTH} {'gated' if gated else 'silu'} {dtype}",
              partial(check_causal_conv, gated=gated, taps=3 if gated else 4, dtype=dtype,
                      backward=backward))
        for gated, backward, dtype in (
            (True, False, "f32"), (False, False, "f16"), (True, True, "f16"), (False, True, "f32"),
        )
    ),
    Check("conv_state", f"5x{WIDTH} after 7 rows",
          partial(check_causal_conv_text, gated=True, rows=5, position=7)),
    Check("conv_state", f"1x{WIDTH} after 7 rows",
          partial(check_causal_conv_text, gated=False, rows=1, position=7)),
]  # fmt: skip
