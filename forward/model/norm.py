"""RMSNorms of a model, as every kernel that norms takes them."""

from __future__ import annotations

from dataclasses import dataclass

from lora.shaders.tensor import Tensor


@dataclass(frozen=True)
class Norm:
    """y = x / sqrt(mean(x²) + epsilon) · weight (Zhang & Sennrich 2019).

    Attributes:
        weight: f32 [width], as the GGUF holds it (Gemma's + 1 included).
        epsilon: added to the mean square.
    """

    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class HeadNorms:
    """The RMSNorms of query and key heads, each on its own."""

    q: Norm  # of head_size columns
    k: Norm

    def __post_init__(self) -> None:
        """Refuses what no kernel does."""
        if self.q.epsilon != self.k.epsilon:
            raise ValueError(
                f"heads are normed with one epsilon: {self.q.epsilon}, {self.k.epsilon}"
            )
