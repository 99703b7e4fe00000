"""A product in stretches, and the norm that adds them up in the same dispatch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


@dataclass(frozen=True)
class Stretches:
    """A product in stretches, which the norm that comes after it adds up.

    Attributes:
        partial: f32 [splits · maximum rows, width], stretch by stretch.
        splits: the number of stretches.
        residual: f32 [rows, width], added to their sum; None for none.
    """

    partial: Tensor
    splits: int
    residual: Tensor | None = None


class ProductNorm(Protocol):
    """A norm that is recorded together with the product that it is given: see `matmul`."""

    def record(self, program: Program, product: Tensor, stretches: Stretches | None = None) -> None:
        """Appends the norm of a finished product or, in one dispatch, of one in stretches."""
