"""The hidden states that enter the lowest adapted layer, kept from one epoch to the next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import wgpu

from lora.data.batches import Batch
from lora.data.examples import Example
from lora.shaders.device import Device
from lora.shaders.tensor import Tensor

AUTO_LIMIT = 512 << 20  # bytes: `reuse_frozen_prefix: auto` keeps up to here


class PrefixCache:
    """What the frozen layers below the adapters make of each example, on the device.

    They never change, and an example's states do not depend on its neighbours or its place in a
    micro-batch, bit for bit: so they are computed once an example, in whatever order the data
    comes, and copied afterwards.

    Args:
        examples: all that will be asked for; `Example.index` is their place.
        hidden_size: numbers a token.
    """

    def __init__(self, device: Device, examples: Sequence[Example], hidden_size: int) -> None:
        lengths = [len(example.ids) for example in examples]
        self._lengths = lengths
        self._row_bytes = 4 * hidden_size
        self._starts = np.concatenate([[0], np.cumsum(lengths)]) * self._row_bytes
        self._known = [False] * len(examples)
        n_values = int(self._starts[-1]) // 4
        self._buffer = device.empty_flat(n_values, purpose="frozen prefix").buffer

    @staticmethod
    def bytes_needed(examples: Sequence[Example], hidden_size: int) -> int:
        """Memory that a cache of these examples takes."""
        return 4 * hidden_size * sum(len(example.ids) for example in examples)

    def holds(self, batch: Batch) -> bool:
        """Whether all examples of a micro-batch are known."""
        return all(self._known[index] for index in batch.examples)

    def keep(self, encoder: wgpu.GPUCommandEncoder, batch: Batch, boundary: Tensor) -> None:
        """Appends copies out of `boundary` [rows, hidden_size], just computed for `batch`."""
        for index, start in zip(batch.examples, batch.example_starts, strict=True):
            if not self._known[index]:
                encoder.copy_buffer_to_buffer(
                    boundary.buffer, start * self._row_bytes, self._buffer,
                    int(self._starts[index]), self._lengths[index] * self._row_bytes,
                )  # fmt: skip
                self._known[index] = True

    def fill(self, encoder: wgpu.GPUCommandEncoder, batch: Batch, boundary: Tensor) -> None:
        """Appends copies into `boundary`, in place of running the frozen layers."""
        for index, start in zip(batch.examples, batch.example_starts, strict=True):
            encoder.copy_buffer_to_buffer(
                self._buffer, int(self._starts[index]), boundary.buffer,
                start * self._row_bytes, self._lengths[index] * self._row_bytes,
            )  # fmt: skip
