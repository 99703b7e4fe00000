"""Powers of two by which a layer's numbers are smaller where they are f16: what readers must know.

`lora.forward.model.balance` finds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lora.forward.model.factors import LoraFactors


@dataclass(frozen=True)
class LayerPowers:
    """What of a layer is stored as another multiple of itself.

    Attributes:
        groups: by group of matrices that share an input, (first row of W, power) in order: what
            the rows from there on are multiplied by, and so the low-rank part beside them.
        gate: what the stored gate is multiplied by before its activation.
        gated: what the gated activation is multiplied by before it is stored.
    """

    groups: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    gate: float = 1.0
    gated: float = 1.0

    def factors(self, group: str, lora: LoraFactors | None) -> LoraFactors | None:
        """A group's factors, scaled as its rows are: the chain rule does the rest."""
        rows = self.groups.get(group)
        if lora is None or rows is None:
            return lora
        powers = [[p for first, p in rows if first <= start][-1] for start, _ in lora.ranges]
        scales = [
            lora.scale * lora.projection_scale(member) * power
            for member, power in enumerate(powers)
        ]
        if len(set(scales)) == 1:
            return replace(lora, scale=scales[0], member_scales=())
        return replace(lora, scale=1.0, member_scales=tuple(scales))


AS_THEY_ARE = LayerPowers()
