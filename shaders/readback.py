"""Small results on their way to the host, without a wait for the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lora.shaders.errors import LoraError
from lora.shaders.memory import Arena
from lora.shaders.tensor import Tensor
from lora.shaders.webgpu import Buffer, Mapped

_POLL_SECONDS = 0.0001
RESULT_DEADLINE = 3600.0  # seconds; a step of 8 B takes minutes where a CPU computes it


class ReadbackRing:
    """Small results read back a few steps late, so that no step waits for the device.

    Each `push` copies a tensor into a free staging buffer and asks for it to be mapped; `ready`
    hands out those that have arrived, in order. A push waits only when every slot is in flight.

    Args:
        arena: of the device that computes the results; the staging buffers are its.
        n_bytes: of each of them.
        slots: results that can be under way.
        deadline: seconds that a result may take once it is waited for.
    """

    def __init__(
        self, arena: Arena, n_bytes: int, slots: int = 8, deadline: float = RESULT_DEADLINE
    ) -> None:
        self._handle = arena.handle
        self._name = arena.facts.name
        self._deadline = deadline
        self._free = [arena.staging(n_bytes) for _ in range(slots)]
        self._n_bytes = n_bytes
        self._in_flight: list[tuple[Buffer, Mapped, Callable[[np.ndarray], Any]]] = []
        self._arrived: list[Any] = []

    def push(self, tensor: Tensor, convert: Callable[[np.ndarray], Any]) -> None:
        """Reads `tensor` as it is after the work submitted so far; `convert` gets its f32s."""
        if tensor.n_bytes != self._n_bytes:
            raise ValueError(f"{tensor.shape} does not fit a ring of {self._n_bytes} bytes")
        if not self._free:
            self._take_first(wait=True)
        buffer = self._free.pop()
        encoder = self._handle.encoder()
        encoder.copy(tensor.buffer, tensor.offset, buffer, 0, self._n_bytes)
        self._handle.submit(encoder.finish())
        self._in_flight.append((buffer, self._handle.map_for_reading(buffer), convert))

    def _take_first(self, *, wait: bool) -> bool:
        buffer, mapped, convert = self._in_flight[0]
        # Polling without blocking: a blocking wait is for all that was submitted, later steps
        # included.
        self._handle.poll()
        latest = time.monotonic() + self._deadline
        while wait and not mapped.arrived():
            if time.monotonic() > latest:
                raise LoraError(
                    f"{self._name} has not given a result for {self._deadline:,.0f} s: its "
                    "driver hangs, or one step takes longer than that. Lower train.batch_size or "
                    "data.max_length, or restart the driver."
                )
            time.sleep(_POLL_SECONDS)
            self._handle.poll()
        if not mapped.arrived():
            return False
        values = np.frombuffer(mapped.take(), np.float32).copy()
        self._in_flight.pop(0)
        self._free.append(buffer)
        self._arrived.append(convert(values))
        return True

    def take(self) -> Any:
        """The first that has not been handed out; waits for it."""
        if not self._arrived:
            self._take_first(wait=True)
        return self._arrived.pop(0)

    def ready(self, *, wait: bool = False) -> list[Any]:
        """What has arrived since the last call, in order; with `wait`, all that was pushed."""
        while self._in_flight and self._take_first(wait=wait):
            pass
        arrived, self._arrived = self._arrived, []
        return arrived
