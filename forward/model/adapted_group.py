"""Where the factors of matrices that share an input lie in the flat arrays."""

from __future__ import annotations

from dataclasses import dataclass

from lora.forward.model.adaptable import AdaptableMatrix
from lora.forward.model.low_rank import LowRank


@dataclass(frozen=True)
class AdaptedGroup:
    """Where the factors of one group of one layer lie in the flat arrays."""

    layer: int  # n_layers for the head
    group: str  # of LayerSpec.groups, or "head"
    members: tuple[AdaptableMatrix, ...]  # the adapted ones
    ranges: tuple[tuple[int, int], ...]
    in_features: int
    a_start: int
    b_start: int
    low: tuple[LowRank, ...]  # of the members
    m_start: int | None = None  # of DoRA's magnitudes

    @property
    def padded_rank(self) -> int:
        """Rows of A, columns of B, that each member has on the device."""
        return whole_quads(max(one.rank for one in self.low))

    @property
    def scale(self) -> float:
        """What all members' products are multiplied by; 1 where they differ."""
        scales = {one.scale for one in self.low}
        return scales.pop() if len(scales) == 1 else 1.0

    @property
    def member_scales(self) -> tuple[float, ...]:
        """See `LoraFactors`."""
        scales = tuple(one.scale for one in self.low)
        return scales if len(set(scales)) > 1 else ()


def whole_quads(n: int) -> int:
    """Rows of B that are stored: kernels take four columns of the output at once."""
    return -(-n // 4) * 4
