"""The low-rank factors as kernels see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lora.forward.model.trained_tokens import EmbeddingFactors, TokenRows
from lora.shaders.tensor import Tensor


@dataclass(frozen=True)
class DoraTensors:
    """What DoRA knows of a group's columns of y, f32 [out_features] each; see forward/dora.py.

    Attributes:
        scales: m / ‖W + s · B · A‖; 1 where nothing is adapted.
        inverses: 1 / ‖W + s · B · A‖; 0 there.
        powers: the scales once more, as `MatrixPart.powers` of each part.
    """

    scales: Tensor
    inverses: Tensor
    powers: tuple[Tensor, ...]


@dataclass(frozen=True)
class LoraFactors:
    """The A and B of matrices that share an input ("members": q k v; gate up; or one alone).

    y[:, start:stop] = x · W[start:stop]ᵀ + scale · z_g · B_gᵀ with z = x · Aᵀ, for each member g
    and its range (start, stop) of output columns. Ranges are in order; a matrix of the group that
    is not adapted has none.

    Attributes:
        a: [members · rank, in_features], the members' A stacked.
        b: [sum of the members' out_features, rank], the members' B stacked.
        rank: a multiple of 4. A rank that is none is padded with rows of A and columns of B that
            are zero: their gradients are zero then, so that AdamW leaves them zero.
        scale: alpha / rank (rsLoRA: alpha / sqrt(rank)), with the rank that the user asked for.
        ranges: output columns [start, stop) of each member.
        member_scales: where members differ in alpha or in the rank that it is divided by: what z of
            each is multiplied by, with a `scale` of 1; empty where they don't.
        magnitude: DoRA's m, [rows of b]; None without DoRA.
        dora: what goes with it, where it is used; those of gradients have none.
    """

    a: Tensor
    b: Tensor
    rank: int
    scale: float
    ranges: tuple[tuple[int, int], ...]
    member_scales: tuple[float, ...] = ()
    magnitude: Tensor | None = None
    dora: DoraTensors | None = None

    @property
    def n_members(self) -> int:
        """How many matrices it adapts."""
        return len(self.ranges)

    def first_feature(self, member: int) -> int:
        """The row of the stacked B where a member's begins."""
        return sum(stop - start for start, stop in self.ranges[:member])

    def projection_scale(self, member: int) -> float:
        """What z of a member is multiplied by beside `scale`."""
        return self.member_scales[member] if self.member_scales else 1.0


@dataclass(frozen=True)
class Factors(Mapping[tuple[int, str], LoraFactors]):
    """An adapter as programs take it: its factors by (layer, group); the head's layer is n_layers.

    Attributes:
        groups: the factors.
        tokens: rows of the embedding that are trained themselves; None where there are none.
        embedding: A and B of the embedding; None where it is not adapted.
    """

    groups: Mapping[tuple[int, str], LoraFactors] = field(default_factory=dict)
    tokens: TokenRows | None = None
    embedding: EmbeddingFactors | None = None

    @property
    def below_layers(self) -> bool:
        """Whether what enters the lowest layer is not the base's."""
        return self.tokens is not None or self.embedding is not None

    def __getitem__(self, key: tuple[int, str]) -> LoraFactors:
        """Those of a group of a layer."""
        return self.groups[key]

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Layers and groups that are adapted."""
        return iter(self.groups)

    def __len__(self) -> int:
        """How many groups are adapted."""
        return len(self.groups)
