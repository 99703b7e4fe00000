"""Kernels in their shortest forms, which drivers compile soonest.

llvmpipe takes most of a tiny model's test to compile, and most of that for rows that a lane holds
and columns that a turn of a loop has: the same lines again. Here there are as few as the templates
allow. What changes decides speed alone: no sum gets another order, no bit another value; but where
a device's products have tiles, these are small, and a long contraction may be cut otherwise.
Kernels' own tests have what real runs have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

from lora.backward import lora as backward_lora
from lora.forward import attention as forward_attention
from lora.forward import lora as forward_lora
from lora.forward import matmul_wide
from lora.forward.plans import matmul_tiles
from lora.forward.plans.matmul_tiles import Tile

_TILES = (Tile(16, 16, 8, 4, 4), Tile(16, 32, 8, 4, 4))
_ROWS = 2  # of a lane: with one a loop over them could be forgotten


@contextmanager
def short_kernels() -> Iterator[None]:
    """While it lasts, products, low-rank parts and attention are recorded in these forms."""
    fitting_tile = forward_attention._fitting_tile
    tiles = {key: replace(tile, unroll=1) for key, tile in forward_attention.GPU_TILES.items()}
    projections = {
        transposed: replace(tuning, blocks=((_ROWS, 1, 1, 1), (1, 1, 1, 1)))
        for transposed, tuning in forward_lora.GPU_TUNINGS.items()
    }
    gradients = {
        name: replace(getattr(backward_lora, name), unroll=1, sides=(4, 4))
        for name in ("CPU_TUNING", "GPU_TUNING")
    }
    with ExitStack() as stack:
        for module, values in (
            (matmul_wide, {"WIDE_ROWS": _ROWS}),
            (
                matmul_tiles,
                {
                    "TILES": _TILES,
                    "HALF_TILES": tuple(replace(tile, item_bytes=2) for tile in _TILES),
                },
            ),
            (forward_lora, {"CPU_ROWS": _ROWS, "GPU_TUNINGS": projections}),
            (backward_lora, gradients),
            (
                forward_attention,
                {
                    "GPU_TILES": tiles,
                    "_fitting_tile": lambda *what: replace(fitting_tile(*what), unroll=1),
                },
            ),
        ):
            stack.enter_context(mock.patch.multiple(module, **values))
        yield
