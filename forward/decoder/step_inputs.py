"""What one run of new tokens through the decoder is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora.forward.attention_decode import RowPlace
from lora.forward.model.inputs import IndexBounds, indices
from lora.shaders.memory import Memory
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor

_ALIGNMENT = 64  # elements: the parts of StepInputs.words begin on 256 bytes


@dataclass(frozen=True)
class StepInputs:
    """What one run brings: up to `rows.maximum` new tokens, in one buffer written at once.

    The token of a run of one row lies where the run before it leaves the most likely one
    (`StepHead.token`): a greedy text goes on without the host.
    """

    rows: Extent
    words: Tensor  # u32, all of the following; the tokens of several rows only
    tokens: Tensor  # u32 [rows]
    positions: Tensor  # u32 [rows], in the cache
    rope_rows: Tensor  # u32 [rows], in rope's tables; see LongExamples
    last_row: Tensor  # u32 [1], the row whose logits are wanted
    # u32 [rows, 2], as of one example: where several rows begin a text. None for one row.
    segments: Tensor | None
    bounds: IndexBounds
    room: int  # of the cache

    @classmethod
    def allocate(
        cls,
        recording: Recording,
        maximum_rows: int,
        bounds: IndexBounds,
        room: int,
        token: Tensor | None = None,
    ) -> StepInputs:
        """A buffer for runs of at most `maximum_rows` tokens.

        Args:
            bounds: of the model.
            room: of the cache, in tokens.
            token: u32 [1], where the token of a run of one row lies.
        """
        rows = recording.memory.extent(maximum_rows)
        width = -(-maximum_rows // _ALIGNMENT) * _ALIGNMENT
        words = recording.memory.empty((3 * width + _ALIGNMENT,), "u32", purpose="inputs")

        def part(index: int, length: int) -> Tensor:
            return replace(words.slice(index * width, index * width + length), extent=rows)

        n = maximum_rows
        tokens = part(0, n) if token is None else replace(token, extent=rows)
        segments = None
        if n > 1:
            segments = recording.memory.empty((n, 2), "u32", extent=rows, purpose="inputs")
        parts = part(1, n), part(2, n), part(3, 1)
        return cls(rows, words, tokens, *parts, segments, bounds, room)

    @property
    def place(self) -> RowPlace:
        """Where the row is, for the kernels of one row."""
        return RowPlace(self.words, position_at=self._width, rope_row_at=2 * self._width)

    @property
    def _width(self) -> int:
        """Elements of words between the beginnings of two parts."""
        return (self.words.size - _ALIGNMENT) // 3

    def write(
        self,
        memory: Memory,
        tokens: Sequence[int] | None,
        first_position: int,
        first_rope_row: int,
    ) -> None:
        """Writes tokens that stand one after another in the text.

        Args:
            tokens: None for the one that is on the device already.
            first_position: of the first of them, in the cache.
            first_rope_row: its row in rope's tables.

        Raises:
            InputError: one of them lies outside of what it indexes.
        """
        n, width = 1 if tokens is None else len(tokens), self._width
        if n < self.rows.maximum or n > 1:  # with one row at most, it is always in use
            memory.set_rows(self.rows, n)
        values = np.zeros(self.words.size, np.uint32)
        if tokens is not None:
            checked = indices("the token", np.array(tokens, np.int64), self.bounds.tokens)
            if self.tokens.buffer is self.words.buffer:
                values[:n] = checked
            else:
                memory.write(self.tokens, checked)
        places = np.arange(n, dtype=np.int64)
        values[width : width + n] = indices("the position", first_position + places, self.room)
        values[2 * width : 2 * width + n] = indices(
            "the row of rope's tables", first_rope_row + places, self.bounds.rope_rows
        )
        values[3 * width] = n - 1
        if self.segments is not None and first_position == 0:
            memory.write_rows(self.segments, 0, np.tile(np.array([0, n], np.uint32), (n, 1)))
        memory.write(self.words, values)
