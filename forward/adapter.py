"""The low-rank factors as the kernels see them."""

from __future__ import annotations

from dataclasses import dataclass

from shaders.tensor import Tensor


@dataclass(frozen=True)
class LoraFactors:
    """The A and B of matrices that share an input ("members": q k v; gate up; or one alone).

    y[:, start:stop] = x · W[start:stop]ᵀ + scale · z_g · B_gᵀ with z = x · Aᵀ, for each member g and
    its range (start, stop) of output columns. Ranges are in order; a matrix of the group that is
    not adapted has none.

    Attributes:
        a: [members · rank, in_features], the members' A stacked.
        b: [sum of the members' out_features, rank], the members' B stacked.
        rank: a multiple of 4. A rank that is none is padded with rows of A and columns of B that
            are zero: their gradients are zero then, so that AdamW leaves them zero.
        scale: alpha / rank (rsLoRA: alpha / sqrt(rank)), with the rank that the user asked for.
        ranges: output columns [start, stop) of each member.
    """

    a: Tensor
    b: Tensor
    rank: int
    scale: float
    ranges: tuple[tuple[int, int], ...]

    @property
    def n_members(self) -> int:
        """How many matrices it adapts."""
        return len(self.ranges)
