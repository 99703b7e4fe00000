"""What attention and the kernels before it must know of heads, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora.forward.model.kv_cache import LayerCache
from lora.forward.model.layer_spec import MOST_HEAD_SIZE, Attention
from lora.shaders.activations import check_shape
from lora.shaders.tensor import Tensor


@dataclass(frozen=True)
class Heads:
    """How q, k and v lie in a row, and how the scores of a layer are made of them.

    Attributes:
        n_heads: query heads.
        n_kv_heads: key and value heads; each serves n_heads / n_kv_heads query heads in a row.
        head_size: a multiple of 4; attention has kernels for at most MOST_HEAD_SIZE.
        scale: of the scores.
        window: a row sees this many keys, its own included; None for all.
        softcap: scores s become softcap · tanh(s / softcap); None for none.
    """

    n_heads: int
    n_kv_heads: int
    head_size: int
    scale: float
    window: int | None = None
    softcap: float | None = None

    @classmethod
    def of(cls, attention: Attention) -> Heads:
        """The heads of one layer of a model."""
        return cls(
            n_heads=attention.n_heads,
            n_kv_heads=attention.n_kv_heads,
            head_size=attention.head_size,
            scale=attention.scale,
            window=attention.window,
            softcap=attention.softcap,
        )

    def __post_init__(self) -> None:
        """Refuses what the kernels cannot do."""
        if self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"{self.n_heads} query heads cannot share {self.n_kv_heads} key heads evenly"
            )
        if self.head_size % 4 or self.head_size < 4:
            raise ValueError(f"head_size is {self.head_size}, expected a multiple of 4")
        if self.window is not None and self.window < 1:
            raise ValueError(f"an attention window of {self.window} rows sees nothing, not itself")
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale}, expected a positive number")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(
                f"softcap is {self.softcap}, expected a positive number, or None for no cap"
            )

    @property
    def query_size(self) -> int:
        """Columns of q."""
        return self.n_heads * self.head_size

    @property
    def qkv_size(self) -> int:
        """Columns of q, k and v together."""
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_size

    def check_attended(self) -> None:
        """Refuses heads that no kernel of attention takes."""
        if self.head_size > MOST_HEAD_SIZE:
            raise ValueError(
                f"head_size is {self.head_size}, expected a multiple of 4 up to {MOST_HEAD_SIZE}"
            )

    def constants(self) -> dict[str, Any]:
        """The template constants that all kernels of one row share."""
        self.check_attended()
        return {
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "head_size": self.head_size,
            "scale": float(self.scale),
            "window": self.window,
            "softcap": None if self.softcap is None else float(self.softcap),
        }

    def check_cache(self, cache: LayerCache) -> int:
        """Checks the shapes of a cache; its room."""
        room, kv_size = cache.values.shape[0], self.n_kv_heads * self.head_size
        check_shape("attention_decode values", cache.values, room, kv_size)
        check_shape("attention_decode keys", cache.keys, kv_size // 4, room, 4)
        return room


@dataclass(frozen=True)
class Rotation:
    """How heads turn.

    Attributes:
        positions: u32 [rows], rows of the tables.
        tables: [n_positions, rope_dimensions / 2, 2] from `Rope.tables`; of a head only the first
            rope_dimensions columns turn.
        interleaved: pairs (2j, 2j + 1) instead of (j, j + rope_dimensions / 2).
    """

    positions: Tensor
    tables: Tensor
    interleaved: bool
