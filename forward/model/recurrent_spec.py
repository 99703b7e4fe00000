"""Mixers that carry a state along a text, in place of attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora.forward.model.adaptable import SHORT_CONVOLUTION, AdaptableMatrix
from lora.forward.model.layer_spec import BlockSpec

CONV_WEIGHT = "shortconv.conv.weight"  # within a layer
MOST_TAPS = 8  # of a convolution


@dataclass(frozen=True)
class ShortConvolution(BlockSpec):
    """out_proj(C · convolution(B · x)) with B, C, x = in_proj of the input (LFM2).

    The convolution is each column's own, over a row and those before it in its example.

    Attributes:
        width: columns of B, of C and of x.
        taps: rows that the convolution sees, its own included.
    """

    width: int
    taps: int
    recurrent = True

    @property
    def in_size(self) -> int:
        """Width of B, C and x side by side."""
        return 3 * self.width

    @property
    def matrices(self) -> tuple[AdaptableMatrix, ...]:
        """See `BlockSpec`."""
        return SHORT_CONVOLUTION

    @property
    def tables(self) -> Mapping[str, tuple[int, ...]]:
        """See `BlockSpec`."""
        return {CONV_WEIGHT: (self.width, self.taps)}
