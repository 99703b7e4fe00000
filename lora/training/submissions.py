"""How long a submission may take, where that is bounded: the device's speed is measured for it."""

from __future__ import annotations

import time

from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor


class MeasuredSpeed:
    """Runs micro-batches, and times the second: a first one may compile.

    Before that the device counts as a slow one.

    Args:
        recording: whose submissions are bounded.
        waited_for: something small that a micro-batch writes.
        seconds: that a submission may take; None for any.
    """

    def __init__(self, recording: Recording, waited_for: Tensor, seconds: float | None) -> None:
        self._recording = recording
        self._waited_for = waited_for
        self._seconds = seconds
        self._measured_in = 0
        if seconds is not None:
            recording.submissions.set_seconds(seconds)
            self._measured_in = 2

    @property
    def wanted(self) -> bool:
        """Whether a micro-batch is still to be timed, and run as a whole for that."""
        return self._measured_in > 0

    def run(self, micro_batch: Program, used: float) -> None:
        """Runs one, and waits for it where its time is to bound submissions.

        Args:
            used: share of the rows that are in use.
        """
        measured = self._measured_in == 1
        self._measured_in = max(0, self._measured_in - 1)
        if not measured or self._seconds is None:
            micro_batch.run()
            return
        memory = self._recording.memory
        memory.read(self._waited_for)
        start = time.perf_counter()
        micro_batch.run()
        memory.read(self._waited_for)
        seconds = time.perf_counter() - start
        flops = sum(dispatch.flops for dispatch in micro_batch.dispatches)
        self._recording.submissions.set_seconds(self._seconds, flops * used / seconds)
