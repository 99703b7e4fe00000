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
from lora.shaders.webgpu import Buffer, Mapped, MappedSource
from lora.training.communicator import Communicator

MOST_PIECES = 8
LEAST_PIECE = 1 << 18  # numbers: smaller ones cost more than they hide
_POLL_SECONDS = 1e-4

_Result = tuple[Buffer, Mapped]  # a staging buffer, and its way to the host
_Source = tuple[Buffer, MappedSource]  # one that the host is to write


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


@dataclass(frozen=True)
class Sums:
    """What is added up over processes.

    Attributes:
        gradient: the first slice, f32 [n]; it holds the sum afterwards.
        loss_sum: f32 [64], the first the sum of losses; the same.
        stretches: the gradient's pieces.
    """

    gradient: Tensor
    loss_sum: Tensor
    stretches: Sequence[Stretch]


@dataclass
class HostSeconds:
    """Of a step's exchange.

    Attributes:
        to_host, to_device: of the host's copies in either direction.
        last_sum: from the last copy to the host until its sum was there.
    """

    to_host: float = 0.0
    to_device: float = 0.0
    last_sum: float = 0.0


class GradientExchange:
    """Adds up the gradients of a step's micro-batches over all processes.

    All processes open one together.

    Args:
        arena: of the device.
        sums: what it adds up.
        communicator: of the processes.
        comm_dtype: see `Communicator.reducer`.

    Attributes:
        host_seconds: what the last `run` took of the host.
    """

    def __init__(
        self, arena: Arena, sums: Sums, communicator: Communicator, comm_dtype: str
    ) -> None:
        self._arena = arena
        self._gradient = sums.gradient
        self._loss_sum = sums.loss_sum
        self._communicator = communicator
        self._reducer = communicator.reducer(comm_dtype)
        self._reducer.reserve([piece.stop - piece.start for piece in sums.stretches])
        self._staging: dict[int, list[Buffer]] = {}
        self._sources: dict[int, _Source] = {}
        self.host_seconds = HostSeconds()

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
        self.host_seconds = HostSeconds()
        under_way: deque[tuple[int, Tensor, Future[np.ndarray]]] = deque()
        computed, last, latest = 0.0, 0.0, time.monotonic() + RESULT_DEADLINE
        while coming or under_way:
            self._arena.handle.poll()
            while coming and coming[0][2][1].arrived():
                number, tensor, result = coming.popleft()
                if not coming:
                    computed = time.perf_counter() - begun
                under_way.append((number, tensor, self._begun(number, tensor, result)))
                last = time.perf_counter()
            while under_way and under_way[0][2].done():
                number, tensor, done = under_way.popleft()
                if not (coming or under_way):
                    self.host_seconds.last_sum = time.perf_counter() - last
                self._put(number, tensor, done.result())
            if coming and time.monotonic() > latest:
                raise LoraError(
                    f"{self._arena.facts.name} has not given a result for {RESULT_DEADLINE:,.0f} s."
                )
            time.sleep(_POLL_SECONDS)
        while not loss[1].arrived():
            self._arena.handle.poll()
        loss_sum = np.empty(self._loss_sum.shape, np.float32)
        self._read(loss, loss_sum)
        parts = self._communicator.gather((loss_sum, computed))
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

    def _read(self, result: _Result, values: np.ndarray) -> None:
        """Copies the numbers of one that has arrived; its buffer can be used again."""
        buffer, mapped = result
        mapped.read_into(values.view(np.uint8))
        self._staging[values.nbytes].append(buffer)

    def _begun(self, number: int, tensor: Tensor, result: _Result) -> Future[np.ndarray]:
        """A piece that has arrived, on its way to the others."""
        began = time.perf_counter()
        values = self._reducer.place(number, tensor.size)
        self._read(result, values)
        self.host_seconds.to_host += time.perf_counter() - began
        return self._reducer.begin(number, values)

    def _put(self, number: int, tensor: Tensor, values: np.ndarray) -> None:
        """Writes a piece's sum over this process's own."""
        began, handle = time.perf_counter(), self._arena.handle
        source = self._sources.pop(number, None)
        if source is None:
            buffer = self._arena.source(tensor.n_bytes)
            source = buffer, handle.map_for_writing(buffer)
        buffer, mapped = source
        while not mapped.arrived():
            handle.poll()
        mapped.write(values.view(np.uint8))
        encoder = handle.encoder()
        encoder.copy(buffer, 0, tensor.buffer, tensor.offset, tensor.n_bytes)
        handle.submit(encoder.finish())
        self._sources[number] = buffer, handle.map_for_writing(buffer)
        self.host_seconds.to_device += time.perf_counter() - began
