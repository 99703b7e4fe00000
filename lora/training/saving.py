"""When a run's checkpoints are due, and where they go."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lora.config.durations import seconds_of
from lora.training.checkpoint import save_checkpoint
from lora.training.listeners import Listener

if TYPE_CHECKING:
    from lora.training.trained import Trained


class Checkpoints:
    """Saves a run's checkpoints: after so many steps, or so much time since the last.

    Args:
        output: gives the run's directory; called when the first one is saved.
        audience: who hear of them.
        saves: False where none is ever due.
    """

    def __init__(
        self,
        session: Trained,
        output: Callable[[], Path],
        audience: Listener,
        *,
        saves: bool = True,
    ) -> None:
        every = session.config.train.save_every if saves else None
        self._session, self._output, self._audience = session, output, audience
        self._steps = every if isinstance(every, int) else None
        self._seconds = seconds_of(every) if isinstance(every, str) else None
        self._saved_at = time.monotonic()
        self._saved: tuple[int, Path] | None = None

    @property
    def due(self) -> bool:
        """Whether it is time for one, and it was not saved yet."""
        if self._seconds is not None:
            return time.monotonic() - self._saved_at >= self._seconds
        return self._steps is not None and self._session.steps_done % self._steps == 0

    def save(self) -> Path:
        """Saves one of the steps done, unless that was done; returns where it lies."""
        step = self._session.steps_done
        if self._saved is None or self._saved[0] != step:
            self._audience.saving(step)
            self._saved = step, save_checkpoint(self._session, self._output())
            self._audience.saved(*self._saved)
        self._saved_at = time.monotonic()
        return self._saved[1]
