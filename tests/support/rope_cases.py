"""What tests of rotary embeddings and of their gradient share."""

from dataclasses import dataclass

import numpy as np

from lora.checks.references.head_norm_rope import HeadLayout
from lora.forward.heads import Heads
from lora.forward.model.rope_frequencies import Rope
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor
from tests.support.kernels import activation

# rows, in use, rotated heads, head size, rotated columns of a head, width; what is wider than the
# rotated heads stands for v.
SHAPES = [
    (1, 1, 1, 4, 4, 4),
    (3, 2, 3, 12, 8, 36),
    (67, 66, 3, 20, 12, 100),
    (67, 66, 3, 20, 8, 100),
    (130, 130, 6, 64, 64, 576),
]


EPSILON, BASE, N_POSITIONS = 1e-6, 10000.0, 5000


@dataclass(frozen=True)
class Case:
    rows: int
    in_use: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    dimensions: int  # of a head, that turn
    interleaved: bool
    dispatches: int = 1

    @property
    def layout(self) -> HeadLayout:
        return HeadLayout(
            self.n_heads, self.n_kv_heads, self.head_size, self.dimensions, self.interleaved,
            BASE, EPSILON,
        )  # fmt: skip

    @property
    def width(self) -> int:
        return self.layout.width

    @property
    def heads(self) -> Heads:
        return Heads(self.n_heads, self.n_kv_heads, self.head_size, scale=1.0)

    def tensors(self, recording: Recording, extent: Extent) -> tuple[np.ndarray, Tensor, Tensor]:
        """Positions, the same on the device, and the tables."""
        positions = np.random.default_rng(self.width).integers(0, N_POSITIONS, self.rows)
        tables = Rope(BASE, self.dimensions, self.interleaved).tables(N_POSITIONS)
        return positions, activation(recording, positions, extent), recording.memory.upload(tables)


CASES = [
    # Fewer quads than lanes, fewer heads than a workgroup takes, whole and broken steps, heads
    # that turn in part, as many lanes as a workgroup has.
    Case(1, 1, 1, 1, 4, 4, True),
    Case(5, 3, 2, 1, 12, 8, False),
    Case(67, 66, 4, 2, 64, 64, False),
    Case(67, 66, 4, 2, 64, 64, True),
    Case(19, 18, 3, 1, 80, 40, False),
    Case(19, 18, 3, 1, 100, 52, True),
    Case(3, 3, 4, 1, 256, 256, False),
    Case(5, 4, 1, 1, 516, 516, True),
    # No whole vectors: rope is a kernel of its own.
    Case(5, 4, 2, 1, 12, 12, False, dispatches=2),
    Case(5, 4, 2, 1, 12, 10, True, dispatches=2),
]
# Each case with the lanes of a CPU or of a GPU, two with both.
CASES_AND_LANES = [(case, i % 2 == 0) for i, case in enumerate(CASES)]
CASES_AND_LANES += [(CASES[2], False), (CASES[5], True)]
HALF_CASES = [
    (CASES[4], "f16", "f32"),
    (CASES[4], "f32", "f16"),
    (CASES[5], "f16", "f16"),
    (CASES[8], "f16", "f16"),
    (CASES[8], "f32", "f16"),
]
