"""A product in stretches, and the kernel that adds them up in the dispatch that follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lora.shaders.activations import check_shape
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor


@dataclass(frozen=True)
class Stretches:
    """A product in stretches, which the kernel that comes after it adds up.

    Attributes:
        partial: f32 [splits · maximum rows, width], stretch by stretch.
        splits: the number of stretches.
        residual: f32 [rows, width], added to their sum; None for none.
        scales, kept: of `ScaledColumns` in forward/product.py, for followers that scale columns
            before the residual; None for none.
    """

    partial: Tensor
    splits: int
    residual: Tensor | None = None
    scales: Tensor | None = None
    kept: Tensor | None = None


def check_stretches(name: str, stretches: Stretches, rows: int, width: int) -> None:
    """Refuses partial sums of another shape."""
    check_shape(f"{name} stretches", stretches.partial, stretches.splits * rows, width)


def scaled_columns(name: str, stretches: Stretches, rows: int, width: int) -> list[Tensor]:
    """What a follower that scales columns binds for it, scales and then kept; empty for none."""
    if stretches.scales is None or stretches.kept is None:
        return []
    check_shape(f"{name} scales", stretches.scales, width)
    check_shape(f"{name} product", stretches.kept, rows, width)
    return [stretches.scales, stretches.kept]


def stretch_constants(
    name: str, stretches: Stretches | None, rows: int, width: int, *, scales: bool = False
) -> dict[str, int]:
    """The template constants of a product in stretches, or of one that is finished.

    Args:
        scales: whether the follower scales columns (`scaled_columns`).
    """
    if stretches is None:
        return {"splits": 1, "maximum_rows": 0}
    check_stretches(name, stretches, rows, width)
    if stretches.residual is not None:
        raise ValueError(f"{name}: a product in stretches has no residual of its own")
    if stretches.scales is not None and not scales:
        raise ValueError(f"{name}: the columns of a product in stretches are not scaled")
    return {"splits": stretches.splits, "maximum_rows": rows}


class Follower(Protocol):
    """A kernel that is recorded together with the product that it is given: see `matmul`."""

    @property
    def scales_columns(self) -> bool:
        """Whether it can scale the columns of a product in stretches."""

    def record(self, program: Program, product: Tensor, stretches: Stretches | None = None) -> None:
        """Appends it for a finished product or, in one dispatch, for one in stretches."""

    def adds_up(self, recording: Recording, width: int, splits: int) -> bool:
        """Whether it can take a product of that width in so many stretches."""
