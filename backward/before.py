"""What lies before a product, on the way down: what gave its source, or the residual stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from lora.forward.plans.stretches import Stretches
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor


@dataclass(frozen=True)
class AddBefore:
    """A block that is given the residual stream: its input's gradient is added to the stream's.

    Attributes:
        out: f32 [rows, hidden_size].
    """

    out: Tensor


@dataclass(frozen=True, kw_only=True)
class SourceBefore(ABC):
    """A kernel that gave a product its source. Its gradient reads what the kernel had read.

    Attributes:
        again: where the source is written once more, bit for bit as in the forward, beside its
            gradient; None where nobody asks for it.
    """

    again: Tensor | None = None
    scales_columns = False

    @abstractmethod
    def record(self, program: Program, product: Tensor, stretches: Stretches | None = None) -> None:
        """Appends the gradient to what the kernel had read.

        Args:
            program: what is appended to.
            product: [rows, width], the gradient to the source.
            stretches: see `lora.forward.plans.stretches.Follower`.
        """

    def adds_up(self, recording: Recording, width: int, splits: int) -> bool:
        """See `lora.forward.plans.stretches.Follower`."""
        return False

    @abstractmethod
    def repeat(self, program: Program, out: Tensor) -> None:
        """Appends the kernel itself: the source into `out`, where no gradient below is wanted."""


Before = SourceBefore | AddBefore
