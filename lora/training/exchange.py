"""A step's gradients on their way through the host to the other processes, and their sum back.

They leave in pieces, from the top layer down, while the device still computes the layers below:
each piece is copied to the host as soon as its last gradient is there, added up by a thread, and
written over the process's own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from lora.forward.model.adapter import AdapterLayout
from lora.shaders.errors import LoraError
from lora.shaders.memory import Arena
from lora.shaders.program import Program
from lora.shaders.readback import RESULT_DEADLINE
from lora.shaders.tensor import Tensor
from lora.shaders.webgpu import Buffer, Mapped
from lora.training.communicator import Communicator

MOST_PIECES = 8
LEAST_PIECE = 1 << 18  # numbers: smaller ones cost more than they hide
_POLL_SECONDS = 1e-4

_Result = tuple[Buffer, Mapped]  # a staging buffer, and its way to the host


@dataclass(frozen=True)
class Stretch:
    """A piece of the flat gradient that is whole once some layer's backward has run.

    Attributes:
        lowest: that layer; n_layers where only the head is in it.
        start, stop: of the flat array.
    """

    lowest: int
    start: int
    stop: int


def stretches(layout: AdapterLayout) -> list[Stretch]:
    """The gradient cut between layers, from the top down; together they are all of it."""
    starts: dict[int, int] = {}
    for group in layout.groups:  # layers lie in the order of their numbers, the head last
        starts.setdefault(group.layer, group.a_start)
    least = max(LEAST_PIECE, -(-layout.size // MOST_PIECES))
    found: list[Stretch] = []
    stop = layout.size
    for layer in sorted(starts, reverse=True):
        start = starts[layer]
        if layer == min(starts):
            start = 0
        elif stop - start < least:
            continue
        found.append(Stretch(layer, start, stop))
        stop = start
    return found or [Stretch(layout.lowest_layer, 0, layout.size)]


@dataclass(frozen=True)
class Piece:
    """How a stretch of the gradient comes to be on the device.

    Attributes:
        backward: the part of the micro-batch's program up to there, from the piece before on.
        sum: of the gradient's slices into the first; None where there is one slice.
    """

    stretch: Stretch
    backward: Program
    sum: Program | None


@dataclass(frozen=True)
class StepOfRanks:
    """How the processes fared in a step.

    Attributes:
        seconds: from its beginning until a process had all its gradients, of each rank.
        total: seconds until this process had all sums.
    """

    seconds: tuple[float, ...]
    total: float

    @property
    def slowest(self) -> int:
        """The rank that the others waited for."""
        return int(np.argmax(self.seconds))

    @property
    def behind(self) -> float:
        """How much longer than the median that one took, as a share."""
        return max(self.seconds) / max(1e-9, float(np.median(self.seconds))) - 1.0

    @property
    def communication(self) -> float:
        """The share of the step in which all waited for sums, and nobody's device computed."""
        return min(1.0, max(0.0, 1.0 - max(self.seconds) / max(1e-9, self.total)))


class GradientExchange:
    """Adds up the gradients of a step's micro-batches over all processes.

    Args:
        arena: of the device.
        gradient: the first slice, f32 [n]; it holds the sum afterwards.
        loss_sum: f32 [64], the first the sum of losses; the same.
        communicator: of the processes.
        comm_dtype: see `Communicator.reducer`.
    """

    def __init__(
        self,
        arena: Arena,
        gradient: Tensor,
        loss_sum: Tensor,
        communicator: Communicator,
        comm_dtype: str,
    ) -> None:
        self._arena = arena
        self._gradient = gradient
        self._loss_sum = loss_sum
        self._communicator = communicator
        self._reducer = communicator.reducer(comm_dtype)
        self._staging = {n: [arena.staging(n)] for n in (loss_sum.n_bytes,)}

    def forget(self) -> None:
        """Drops what f16's rounding left: a checkpoint is gone on with without it."""
        self._reducer.forget()

    def close(self) -> None:
        """Ends the thread."""
        self._reducer.close()

    def run(self, pieces: Sequence[Piece], begun: float, *, backward: bool) -> StepOfRanks:
        """Runs the rest of a step's last micro-batch, and leaves everyone's sum on the device.

        Args:
            pieces: of the programs.
            begun: when the step began, by `time.perf_counter`.
            backward: False where that has run, or this process has no micro-batch.
        """
        coming: deque[tuple[int, Tensor, _Result]] = deque()
        for number, piece in enumerate(pieces):
            if backward:
                piece.backward.run()
            if piece.sum is not None:
                piece.sum.run()
            tensor = self._gradient.slice(piece.stretch.start, piece.stretch.stop)
            coming.append((number, tensor, self._asked(tensor)))
        loss = self._asked(self._loss_sum)
        under_way: deque[tuple[Tensor, Future[np.ndarray]]] = deque()
        computed, latest = 0.0, time.monotonic() + RESULT_DEADLINE
        while coming or under_way:
            self._arena.handle.poll()
            while coming and coming[0][2][1].arrived():
                number, tensor, result = coming.popleft()
                if not coming:
                    computed = time.perf_counter() - begun
                under_way.append((tensor, self._reducer.begin(number, self._taken(result))))
            while under_way and under_way[0][1].done():
                tensor, done = under_way.popleft()
                self._arena.write(tensor, done.result())
            if coming and time.monotonic() > latest:
                raise LoraError(
                    f"{self._arena.facts.name} has not given a result for {RESULT_DEADLINE:,.0f} s."
                )
            time.sleep(_POLL_SECONDS)
        while not loss[1].arrived():
            self._arena.handle.poll()
        parts = self._communicator.gather((self._taken(loss), computed))
        total = parts[0][0].copy()
        for theirs, _ in parts[1:]:
            total += theirs
        self._arena.write(self._loss_sum, total)
        return StepOfRanks(tuple(seconds for _, seconds in parts), time.perf_counter() - begun)

    def _asked(self, tensor: Tensor) -> _Result:
        """A staging buffer that a tensor, as it is then, is copied into, and its mapping."""
        free = self._staging.setdefault(tensor.n_bytes, [])
        buffer = free.pop() if free else self._arena.staging(tensor.n_bytes)
        handle = self._arena.handle
        encoder = handle.encoder()
        encoder.copy(tensor.buffer, tensor.offset, buffer, 0, tensor.n_bytes)
        handle.submit(encoder.finish())
        return buffer, handle.map_for_reading(buffer)

    def _taken(self, result: _Result) -> np.ndarray:
        """The numbers of one that has arrived; its buffer can be used again."""
        buffer, mapped = result
        values = np.frombuffer(mapped.take(), np.float32)
        self._staging[values.nbytes].append(buffer)
        return values
