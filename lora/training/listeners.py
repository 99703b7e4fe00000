"""Who hears of a run while it goes on: the file of metrics, a progress bar, loggers of users."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from lora.shaders.choice import say_once
from lora.storage.files import write_file
from lora.training.metrics import EvalResult, Metrics, as_json
from lora.training.session import TrainingSession


class Listener:
    """Hears of a run; each method does nothing here, so that a listener has those it wants.

    All are called on the thread that trains, between two steps.
    """

    def started(self, session: TrainingSession) -> None:
        """Before the first step; a resumed run has `session.steps_done` behind it."""

    def step(self, metrics: Metrics) -> bool:
        """After each step, in order, up to three steps late. True asks the run to stop."""
        return False

    def evaluated(self, step: int, result: EvalResult) -> bool:
        """After an evaluation of the adapter as `step` left it. True asks the run to stop."""
        return False

    def saved(self, step: int, path: Path) -> None:
        """After a checkpoint, or the adapter at the end, was written to `path`."""

    def rewound(self, step: int) -> None:
        """After the device was lost and opened anew: what follows is the step behind `step`."""

    def ended(self, error: BaseException | None) -> None:
        """At the end, whatever it was: None where the adapter was saved, else what is raised."""


class MetricsFile(Listener):
    """A line of JSON for each step and each evaluation, behind those that are there.

    Args:
        path: of the file; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def started(self, session: TrainingSession) -> None:
        """Opens the file."""
        self._file = open(self._path, "a")  # noqa: SIM115 (closed in `ended`)
        self._failed = False

    def step(self, metrics: Metrics) -> bool:
        """Writes the step's metrics."""
        self._write(metrics.as_dict())
        return False

    def evaluated(self, step: int, result: EvalResult) -> bool:
        """Writes the loss."""
        self._write({"step": step, "eval_loss": as_json(result.loss)})
        return False

    def rewound(self, step: int) -> None:
        """Takes out the lines of steps that are run again."""
        self.ended(None)
        drop_metrics_after(self._path, step)
        self._file = open(self._path, "a")  # noqa: SIM115 (closed in `ended`)

    def ended(self, error: BaseException | None) -> None:
        """Closes the file."""
        if self._file is not None:
            with suppress(OSError):  # what is left in its buffer: `_write` has said so
                self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            raise ValueError("metrics of a run that has not started")
        if self._failed:
            return
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:  # a line of metrics is not worth a run
            self._failed = True
            say_once(
                f"{self._path} cannot be written ({error.strerror}): the run goes on without it."
            )


def drop_metrics_after(path: Path, step: int) -> None:
    """Leaves the lines of a file of metrics up to a step; what came after is trained again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            values = json.loads(line)
            if values["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            break  # a crash left half a line
    write_file(path, "".join(kept))


class Audience(Listener):
    """Several listeners as one, told in their order; one that asks for a stop is enough."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = tuple(listeners)

    @contextmanager
    def hearing(self, session: TrainingSession) -> Iterator[None]:
        """Tells of the start and, however the block is left, of the end."""
        begun: list[Listener] = []
        error: BaseException | None = None
        try:
            for listener in self._listeners:
                begun.append(listener)
                listener.started(session)
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            for listener in reversed(begun):
                listener.ended(error)

    def step(self, metrics: Metrics) -> bool:
        """Tells all."""
        return any([listener.step(metrics) for listener in self._listeners])

    def evaluated(self, step: int, result: EvalResult) -> bool:
        """Tells all."""
        return any([listener.evaluated(step, result) for listener in self._listeners])

    def rewound(self, step: int) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.rewound(step)

    def saved(self, step: int, path: Path) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.saved(step, path)
