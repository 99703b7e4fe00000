"""What one run of new tokens through the decoder is given, and what it computes on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lora.forward.attention_decode import RowPlace
from lora.forward.int_row import IntRow, takes_int_row
from lora.forward.model.adapter import LoraFactors
from lora.forward.model.frozen_model import Model
from lora.forward.model.weights import FrozenMatrix
from lora.shaders.activations import extent_of
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

    @classmethod
    def allocate(
        cls, recording: Recording, maximum_rows: int, token: Tensor | None = None
    ) -> StepInputs:
        """A buffer for runs of at most `maximum_rows` tokens.

        Args:
            token: u32 [1], where the token of a run of one row lies.
        """
        rows = recording.memory.extent(maximum_rows)
        width = -(-maximum_rows // _ALIGNMENT) * _ALIGNMENT
        words = recording.memory.empty((3 * width + _ALIGNMENT,), "u32", purpose="inputs")

        def part(index: int, length: int) -> Tensor:
            return replace(words.slice(index * width, index * width + length), extent=rows)

        n = maximum_rows
        tokens = part(0, n) if token is None else replace(token, extent=rows)
        return cls(rows, words, tokens, part(1, n), part(2, n), part(3, 1))

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
        """
        n, width = 1 if tokens is None else len(tokens), self._width
        if n < self.rows.maximum or n > 1:  # with one row at most, it is always in use
            memory.set_rows(self.rows, n)
        values = np.zeros(self.words.size, np.uint32)
        if tokens is not None and self.tokens.buffer is self.words.buffer:
            values[:n] = tokens
        elif tokens is not None:
            memory.write(self.tokens, np.array(tokens, np.uint32))
        values[width : width + n] = np.arange(first_position, first_position + n)
        values[2 * width : 2 * width + n] = np.arange(first_rope_row, first_rope_row + n)
        values[3 * width] = n - 1
        memory.write(self.words, values)


@dataclass(frozen=True)
class Row:
    """One row on its way into a product.

    Attributes:
        values: [1, width].
        norm: weight [width] of the RMSNorm before the product; None for none.
        ints: what the product takes instead of the values; None if it takes these.
    """

    values: Tensor
    norm: Tensor | None = None
    ints: IntRow | None = None


@dataclass(frozen=True)
class StepActivations:
    """What the layers compute on the way; every layer in the same tensors."""

    x: Tensor  # [rows, hidden_size], the residual stream
    normed: Tensor  # [rows, hidden_size], before attention and before the feed-forward block
    raw_qkv: Tensor | None  # [rows, qkv_size], before the norm of its heads, with qk_norm
    qkv: Tensor  # [rows, qkv_size]
    attended: Tensor  # [rows, query_size]
    block_output: Tensor | None  # [rows, hidden_size], before its norm, with post_norms
    middle: Tensor  # [rows, hidden_size], the residual stream after attention
    gate_up: Tensor  # [rows, 2 · intermediate_size]
    gated: Tensor  # [rows, intermediate_size]
    low: dict[int, Tensor] = field(default_factory=dict)  # z by its width: adapters differ in rank
    ints: dict[str, IntRow] = field(default_factory=dict)  # of one row, by what it is of

    def z(self, recording: Recording, lora: LoraFactors) -> Tensor:
        """The tensor for the z of an adapted group."""
        width = lora.n_members * lora.rank
        if width not in self.low:
            shape = (self.x.shape[0], width)
            self.low[width] = recording.memory.empty(shape, extent=self.x.extent)
        return self.low[width]

    def row_before(
        self,
        recording: Recording,
        name: str,
        values: Tensor,
        matrix: FrozenMatrix,
        norm: Tensor | None = None,
    ) -> Row:
        """One row in the form that a product with `matrix` takes.

        Args:
            name: the whole numbers of rows of one name lie in the same memory: none may be needed
                when the next is written.
            values: [1, width].
            norm: weight of the RMSNorm between; None for none.
        """
        if not takes_int_row(recording, matrix):
            return Row(values, norm)
        if name not in self.ints:
            self.ints[name] = IntRow.allocate(recording, values.shape[1], extent_of(values))
        return Row(values, norm, self.ints[name].before_norm(norm))

    @classmethod
    def allocate(cls, recording: Recording, model: Model, rows: Extent) -> StepActivations:
        """Tensors for up to rows.maximum tokens."""
        a = model.architecture

        def tensor(width: int) -> Tensor:
            return recording.memory.empty((rows.maximum, width), extent=rows)

        return cls(
            x=tensor(a.hidden_size),
            normed=tensor(a.hidden_size),
            raw_qkv=tensor(a.qkv_size) if a.qk_norm else None,
            qkv=tensor(a.qkv_size),
            attended=tensor(a.query_size),
            block_output=tensor(a.hidden_size) if a.post_norms else None,
            middle=tensor(a.hidden_size),
            gate_up=tensor(2 * a.intermediate_size),
            gated=tensor(a.intermediate_size),
        )


@dataclass(frozen=True)
class StepHead:
    """The last row's way to its logits."""

    row: Extent  # of one row, always in use
    last: Tensor  # [1, hidden_size]
    normed: Tensor  # [1, hidden_size]
    logits: Tensor  # [1, logits_size]
    token: Tensor  # u32 [1], the most likely one

    @classmethod
    def allocate(cls, recording: Recording, model: Model) -> StepHead:
        """Tensors for one row."""
        a = model.architecture
        row = recording.memory.extent(1)
        return cls(
            row=row,
            last=recording.memory.empty((1, a.hidden_size), extent=row),
            normed=recording.memory.empty((1, a.hidden_size), extent=row),
            logits=recording.memory.empty((1, a.logits_size), purpose="logits", extent=row),
            token=recording.memory.empty((1,), "u32", extent=row),
        )
