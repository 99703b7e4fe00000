"""Where the A and B of an adapted embedding lie in the flat arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora.forward.model.adaptable import EMBEDDING
from lora.forward.model.adapted_group import whole_quads
from lora.forward.model.architecture import Architecture
from lora.forward.model.low_rank import LowRank
from lora.forward.model.trained_tokens import EmbeddingFactors
from lora.shaders.errors import InputError
from lora.shaders.facts import DeviceFacts
from lora.shaders.tensor import Tensor


@dataclass(frozen=True)
class EmbeddingPlace:
    """A as [vocab_size, rank] and behind it B as [rank, hidden_size], in whole quads.

    PEFT's are the other way round. A's rows are looked up like the base's.

    Attributes:
        start: where A begins.
        alignment: B begins on a multiple of it, and what follows.
        low: rank and scale.
    """

    architecture: Architecture
    start: int
    alignment: int
    low: LowRank

    @property
    def a_shape(self) -> tuple[int, int]:
        """Of A as it lies."""
        return whole_quads(self.architecture.vocab_size), whole_quads(self.low.rank)

    @property
    def b_shape(self) -> tuple[int, int]:
        """Of B as it lies."""
        return whole_quads(self.low.rank), self.architecture.hidden_size

    @property
    def b_start(self) -> int:
        """Where B begins."""
        rows, columns = self.a_shape
        return self._aligned(self.start + rows * columns)

    @property
    def end(self) -> int:
        """Where what follows begins."""
        rows, columns = self.b_shape
        return self._aligned(self.b_start + rows * columns)

    @property
    def n_trainable(self) -> int:
        """Parameters, padding not counted."""
        return self.low.rank * (self.architecture.vocab_size + self.architecture.hidden_size)

    def _aligned(self, n: int) -> int:
        return -(-n // self.alignment) * self.alignment

    def factors(self, flat: Tensor) -> EmbeddingFactors:
        """The factors inside a flat tensor [size]."""
        a, b = (
            flat.slice(start, start + rows * columns).reshape(rows, columns)
            for start, (rows, columns) in (
                (self.start, self.a_shape), (self.b_start, self.b_shape)
            )
        )  # fmt: skip
        return EmbeddingFactors(a, b, self.low.scale)

    def views(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """PEFT's A [rank, vocab_size] and B [hidden_size, rank], views of a flat array."""
        a, b = (
            flat[start : start + rows * columns].reshape(rows, columns)
            for start, (rows, columns) in (
                (self.start, self.a_shape), (self.b_start, self.b_shape)
            )
        )  # fmt: skip
        return a[: self.architecture.vocab_size, : self.low.rank].T, b[: self.low.rank].T

    def check_bindings(self, facts: DeviceFacts) -> None:
        """Checks that the device can bind A, the larger of both.

        Raises:
            InputError: it is too large; the message has the highest rank that works.
        """
        rows, columns = self.a_shape
        if 4 * rows * columns > facts.max_binding:
            highest = facts.max_binding // (4 * rows) // 4 * 4
            raise InputError(
                f"adapter.rank: got {self.low.rank}; A of {EMBEDDING.module} would take "
                f"{4 * rows * columns / 2**20:.0f} MiB, more than the "
                f"{facts.max_binding / 2**20:.0f} MiB that {facts.name} can bind. The highest "
                f"rank for it here is {highest}."
            )
