"""What a micro-batch brings: tokens, positions, segments, targets, in buffers of fixed place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora.forward.model.host_table import HostTable, TableRows
from lora.shaders.errors import InputError
from lora.shaders.memory import Memory
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor

NO_ROW = 0xFFFFFFFF  # an index that stands for a row of zeros
CHUNK_ALIGNMENT = 64  # rows: labels and losses of a chunk begin on 256 bytes


@dataclass(frozen=True)
class IndexBounds:
    """Where what indexes on the device must end; exclusive.

    Attributes:
        tokens: the model's vocabulary.
        rope_rows: rows of the tables of the rotary embedding.
    """

    tokens: int
    rope_rows: int


def indices(name: str, values: np.ndarray, end: int, *, but: int | None = None) -> np.ndarray:
    """Whole numbers as the device indexes with them: this is where they are checked.

    Kernels run without checks of their own (docs/architecture.md): an index beyond its tensor would
    read another's memory. So what indexes is written through here, all of it.

    Args:
        name: what they are, for the message.
        values: integers of any shape.
        end: they must be below it, and not negative.
        but: one more value that stands for none.

    Returns:
        u32, of the same shape.

    Raises:
        InputError: one lies outside.
    """
    wrong = (values < 0) | (values >= end)
    if but is not None:
        wrong &= values != but
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        raise InputError(
            f"{name} {int(values.reshape(-1)[place])} at place {place} is out of range: it must be "
            f"at least 0 and below {end}."
        )
    return values.astype(np.uint32)


def token_order(tokens: np.ndarray) -> np.ndarray:
    """The rows by their tokens, those of a token ascending; u32 [n]."""
    return np.argsort(tokens, kind="stable").astype(np.uint32)


@dataclass(frozen=True)
class LongExamples:
    """Examples that take LongRoPE's long divisors: the second half of the tables.

    Each example decides for itself, as transformers does with one row in a batch.
    """

    longer_than: int  # tokens
    first_position: int  # in the tables


@dataclass(frozen=True)
class Inputs:
    """Device buffers for up to `rows.maximum` tokens, written before each replay.

    There is no batch dimension: the examples of a micro-batch lie end to end, without padding
    between them, and attention is kept apart by `segments`. Rows with a target are listed
    compactly, so that the head works on those only, in chunks.
    """

    rows: Extent
    tokens: Tensor  # u32 [rows]
    positions: Tensor  # u32 [rows], within each example; see LongExamples
    segments: Tensor  # u32 [rows, 2]: first row and end (exclusive) of the row's example
    targets: Extent  # rows that have a target
    target_rows: Tensor  # u32 [targets]: their rows
    target_slots: Tensor  # u32 [rows]: the inverse; NO_ROW without a target
    labels: Tensor  # u32 [targets]
    chunks: tuple[tuple[int, int, Extent], ...]  # of the targets: start, stop, extent
    bounds: IndexBounds
    long_examples: LongExamples | None
    table_rows: TableRows | None = None  # of the tokens, where a table is on the host
    token_order: Tensor | None = None  # u32 [rows], `token_order`, where a gradient takes it

    @classmethod
    def allocate(
        cls,
        recording: Recording,
        maximum_rows: int,
        maximum_targets: int,
        chunk_size: int,
        bounds: IndexBounds,
        long_examples: LongExamples | None = None,
        table: HostTable | None = None,
        *,
        ordered: bool = False,
    ) -> Inputs:
        """Buffers for micro-batches of at most `maximum_rows` tokens.

        Args:
            maximum_targets: rows of these that may have a target.
            chunk_size: target rows whose logits exist at one time; a multiple of 64.
            bounds: of the model.
            long_examples: of the model.
            table: of the model, where it has one on the host.
            ordered: whether the tokens' order is written, too.

        Raises:
            InputError: the device can't bind so many tokens' rows of the table.
        """
        padded = -(-maximum_targets // CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT
        rows, targets = recording.memory.extent(maximum_rows), recording.memory.extent(padded)
        chunks = []
        for start in range(0, padded, chunk_size):
            stop = min(start + chunk_size, padded)
            chunks.append((start, stop, recording.memory.extent(stop - start)))

        def integers(extent: Extent, *shape: int) -> Tensor:
            return recording.memory.empty(
                (extent.maximum, *shape), "u32", purpose="inputs", extent=extent
            )

        return cls(
            rows=rows,
            tokens=integers(rows),
            positions=integers(rows),
            segments=integers(rows, 2),
            targets=targets,
            target_rows=integers(targets),
            target_slots=integers(rows),
            labels=integers(targets),
            chunks=tuple(chunks),
            bounds=bounds,
            long_examples=long_examples,
            table_rows=None if table is None else TableRows.allocate(recording, table, rows),
            token_order=integers(rows) if ordered else None,
        )

    def write(
        self,
        memory: Memory,
        token_ids: np.ndarray,
        positions: np.ndarray,
        segment_start: np.ndarray,
        segment_end: np.ndarray,
        targets: np.ndarray,
    ) -> int:
        """Writes one micro-batch and sets the extents; returns the number of targets.

        Args:
            token_ids, positions, segment_start, segment_end: integers [n].
            targets: [n], the next token where it is trained, else negative.

        Raises:
            InputError: one of them lies outside of what it indexes.
        """
        n = len(token_ids)
        tokens = indices("the token", token_ids, self.bounds.tokens)
        bounds_of_rows = np.stack([segment_start, segment_end - 1], axis=1)
        indices("the example's first or last row", bounds_of_rows, n)
        if self.long_examples is not None:
            long = segment_end - segment_start > self.long_examples.longer_than
            positions = positions + long * self.long_examples.first_position
        (target_rows,) = np.nonzero(targets >= 0)
        slots = np.full(n, NO_ROW, np.uint32)
        slots[target_rows] = np.arange(len(target_rows), dtype=np.uint32)
        memory.set_rows(self.rows, n)
        memory.write_rows(self.tokens, 0, tokens)
        if self.token_order is not None:
            memory.write_rows(self.token_order, 0, token_order(tokens))
        if self.table_rows is not None:
            self.table_rows.write(memory, tokens)
        memory.write_rows(
            self.positions, 0, indices("the position", positions, self.bounds.rope_rows)
        )
        memory.write_rows(self.segments, 0, np.stack([segment_start, segment_end], axis=1))
        memory.write_rows(self.target_slots, 0, slots)
        memory.set_rows(self.targets, len(target_rows))
        if len(target_rows):
            memory.write_rows(self.target_rows, 0, target_rows)
            labels = indices("the target", targets[target_rows], self.bounds.tokens)
            memory.write_rows(self.labels, 0, labels)
        for start, stop, extent in self.chunks:
            memory.set_rows(extent, min(max(len(target_rows) - start, 0), stop - start))
        return len(target_rows)
