"""A table of vectors by token that stays on the host: only a batch's rows reach the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora.forward.gguf.file import GGUFTensor
from lora.forward.gguf.quantization import QUANTIZATIONS, Quantization
from lora.forward.model.weights import FrozenMatrix, MatrixPart, check_finite
from lora.shaders.errors import InputError
from lora.shaders.facts import DeviceFacts
from lora.shaders.memory import Memory
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor


@dataclass(frozen=True)
class HostTable:
    """A GGUF's matrix [vocab_size, width] that the memory-mapped file is the only place of."""

    tensor: GGUFTensor

    @property
    def width(self) -> int:
        """Numbers that a token has."""
        return self.tensor.shape[1]

    @property
    def quantization(self) -> Quantization:
        """Of its rows."""
        return QUANTIZATIONS[self.tensor.type]

    def check(self, facts: DeviceFacts) -> None:
        """Checks that the device can bind the rows of at least one token.

        Raises:
            InputError: it cannot.
        """
        if 4 * self.width > facts.max_binding:
            raise InputError(
                f"The tensor {self.tensor.name!r} has {self.width} numbers a token, more than "
                f"{facts.name} can bind."
            )


@dataclass(frozen=True)
class TableRows:
    """The rows of a table for the tokens of a micro-batch, or of a piece of text.

    Attributes:
        table: what they are of.
        matrix: [most rows, width], each token's row once, in the table's own type.
        slots: u32 [rows], each token's row in it.
    """

    table: HostTable
    matrix: FrozenMatrix
    slots: Tensor

    @classmethod
    def allocate(cls, recording: Recording, table: HostTable, rows: Extent) -> TableRows:
        """Room for the rows of up to rows.maximum tokens.

        Raises:
            InputError: they are more than the device can bind.
        """
        n_words = table.quantization.row_words(table.width)
        row_bytes = 4 * max(n_words, table.width)  # as they come, and decoded
        if rows.maximum * row_bytes > recording.facts.max_binding:
            most = recording.facts.max_binding // row_bytes
            raise InputError(
                f"{rows.maximum} tokens at once need more of the tensor {table.tensor.name!r} than "
                f"{recording.facts.name} can bind; {most} tokens fit. Lower train.batch_size or "
                "data.max_length."
            )
        words = recording.memory.empty((rows.maximum, n_words), "u32", purpose="inputs")
        part = MatrixPart(table.quantization, words, 0)
        slots = recording.memory.empty((rows.maximum,), "u32", purpose="inputs", extent=rows)
        return cls(table, FrozenMatrix(rows.maximum, table.width, (part,)), slots)

    def write(self, memory: Memory, tokens: np.ndarray | Sequence[int]) -> None:
        """Sends the rows of these tokens, each once.

        Raises:
            InputError: a number in them is NaN or infinite.
        """
        needed, slots = np.unique(np.asarray(tokens, np.int64), return_inverse=True)
        rows = self.table.tensor.data
        data = np.concatenate([rows[token : token + 1] for token in needed])
        quantization = self.table.quantization
        check_finite(self.table.tensor, quantization, data, needed)
        packed = quantization.pack(data, self.table.width)
        memory.write_rows(self.matrix.parts[0].words, 0, packed)
        memory.write_rows(self.slots, 0, slots.reshape(-1).astype(np.uint32))
