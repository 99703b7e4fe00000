"""The hidden states that enter the lowest adapted layer, kept from one epoch to the next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora.data.batches import Batch
from lora.data.examples import Example, lengths_of
from lora.shaders.program import Copy, Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

AUTO_LIMIT = 512 << 20  # bytes: `reuse_frozen_prefix: auto` keeps up to here


class PrefixCache:
    """What the frozen layers below the adapters make of each example, on the device.

    They never change, and an example's states do not depend on its neighbours or its place in a
    micro-batch, bit for bit: so they are computed once an example, in whatever order the data
    comes, and copied afterwards.

    Args:
        recording: whose memory holds the states.
        examples: all that will be asked for; `Example.index` is their place.
        hidden_size: numbers a token.
    """

    def __init__(self, recording: Recording, examples: Sequence[Example], hidden_size: int) -> None:
        self._recording = recording
        self._lengths = lengths_of(examples).tolist()
        self._hidden_size = hidden_size
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)])
        self._known = [False] * len(examples)
        n_values = self.bytes_needed(examples, hidden_size) // 4
        self._states = recording.memory.empty_flat(n_values, purpose="frozen prefix")

    @staticmethod
    def bytes_needed(examples: Sequence[Example], hidden_size: int) -> int:
        """Memory that a cache of these examples takes."""
        return 4 * hidden_size * int(lengths_of(examples).sum(dtype=np.int64))

    def holds(self, batch: Batch) -> bool:
        """Whether all examples of a micro-batch are known."""
        return all(self._known[index] for index in batch.examples)

    def keep(self, batch: Batch, boundary: Tensor) -> None:
        """Copies out of `boundary` [rows, hidden_size], just computed for `batch`."""
        copies = []
        for index, row in zip(batch.examples, batch.example_starts, strict=True):
            if not self._known[index]:
                copies.append(Copy("keep", self._rows(boundary, row, index), self._held(index)))
                self._known[index] = True
        self._run(copies)

    def fill(self, batch: Batch, boundary: Tensor) -> None:
        """Copies into `boundary`, in place of running the frozen layers."""
        self._run(
            [
                Copy("fill", self._held(index), self._rows(boundary, row, index))
                for index, row in zip(batch.examples, batch.example_starts, strict=True)
            ]
        )

    def _held(self, index: int) -> Tensor:
        """The states of an example."""
        return self._rows(self._states, int(self._starts[index]), index)

    def _rows(self, tensor: Tensor, first: int, index: int) -> Tensor:
        """As many rows of a tensor as an example has, to be copied (not bound: offsets vary)."""
        return Tensor(
            tensor.buffer,
            tensor.offset + 4 * self._hidden_size * first,
            (self._lengths[index], self._hidden_size),
        )

    def _run(self, copies: Sequence[Copy]) -> None:
        program = Program(self._recording)
        program.commands += copies
        program.run()
