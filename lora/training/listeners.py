"""Who hears of a run while it goes on: the file of metrics, a progress bar, loggers of users."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from lora.shaders.choice import say_once
from lora.storage.files import write_file
from lora.training.metrics import EvalResult, Metrics, Sample, as_json

SAMPLES = "samples.jsonl"


class Listener:
    """Hears of a run; each method does nothing here, so that a listener has those it wants.

    All are called on the thread that trains, between two steps; `stopping` on the main one.

    Example:
        >>> class Patience(Listener):
        ...     def step(self, metrics):
        ...         return metrics.loss < 0.1  # True ends the run
        >>> run_training(session, listeners=[Patience()])
    """

    def started(self, session: Any) -> None:
        """Before the first step; a resumed run has `session.steps_done` behind it.

        Args:
            session: the `TrainingSession`.
        """

    def step(self, metrics: Metrics) -> bool:
        """After each step, in order, up to three steps late. True asks the run to stop."""
        return False

    def several(self, steps: Sequence[Metrics]) -> None:
        """In place of `step` of each, where `Unhurried` passes on those that waited."""
        for metrics in steps:
            self.step(metrics)

    def evaluated(self, step: int, result: EvalResult) -> bool:
        """After an evaluation of the adapter as `step` left it. True asks the run to stop."""
        return False

    def evaluating(self, step: int, done: int, total: int) -> None:
        """During an evaluation: how many of its examples are done."""

    def improved(self, step: int, metric: str, value: float) -> None:
        """Before `evaluated` of the evaluation that is the best so far, by `train.best`."""

    def stopped_early(self, step: int, evaluations: int) -> None:
        """After an evaluation that ends the run: so many in a row brought no gain."""

    def sampling(self, step: int, done: int, total: int) -> None:
        """While the model answers `train.sample_prompts`: how many are answered."""

    def sampled(self, step: int, samples: Sequence[Sample]) -> None:
        """After the model, as `step` left it, answered `train.sample_prompts`."""

    def stopping(self, signum: int) -> None:
        """At once when a signal asks for a stop, which comes after the step under way."""

    def saving(self, step: int) -> None:
        """Before a checkpoint is written: a resumed run goes on behind `step`."""

    def saved(self, step: int, path: Path) -> None:
        """After a checkpoint, or the adapter at the end, was written to `path`."""

    def rewound(self, step: int) -> None:
        """After the device was lost and opened anew: what follows is the step behind `step`."""

    def ended(self, error: BaseException | None) -> None:
        """At the end, whatever it was: None where the adapter was saved, else what is raised."""


class _LinesFile(Listener):
    """A file of JSON lines, behind those that are there.

    Args:
        path: of the file; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def started(self, session: Any) -> None:
        """Opens the file."""
        self._file = open(self._path, "a")  # noqa: SIM115 (closed in `ended`)
        self._failed = False

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

    def _write(self, *lines: dict[str, Any]) -> None:
        if self._file is None:
            raise ValueError("metrics of a run that has not started")
        if self._failed:
            return
        try:
            self._file.write("".join(json.dumps(line) + "\n" for line in lines))
            self._file.flush()
        except OSError as error:  # a line of metrics is not worth a run
            self._failed = True
            say_once(
                f"{self._path} cannot be written ({error.strerror}): the run goes on without it."
            )


class MetricsFile(_LinesFile):
    """A line for each step and each evaluation."""

    def step(self, metrics: Metrics) -> bool:
        """Writes the step's metrics."""
        self._write(metrics.as_dict())
        return False

    def several(self, steps: Sequence[Metrics]) -> None:
        """Writes theirs at once."""
        self._write(*(metrics.as_dict() for metrics in steps))

    def evaluated(self, step: int, result: EvalResult) -> bool:
        """Writes loss, perplexity, accuracy and exact match, of each named set, too."""
        found = {name: as_json(value) for name, value in result.metrics().items()}
        self._write({"step": step, **found, "eval_seconds": round(result.seconds, 3)})
        return False


class SamplesFile(_LinesFile):
    """A line for each answer to one of train.sample_prompts; no file where there are none."""

    def started(self, session: Any) -> None:
        """Opens the file, where there is something to write."""
        if session.config.train.sample_prompts:
            super().started(session)

    def rewound(self, step: int) -> None:
        """As of the other files."""
        if self._file is not None:
            super().rewound(step)

    def sampled(self, step: int, samples: Sequence[Sample]) -> None:
        """Writes the answers."""
        for sample in samples:
            self._write({"step": step, "prompt": sample.prompt, "text": sample.text})


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
    def hearing(self, session: Any) -> Iterator[None]:
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

    def started(self, session: Any) -> None:
        """Tells all, where they are one listener of others; else `hearing` does."""
        for listener in self._listeners:
            listener.started(session)

    def ended(self, error: BaseException | None) -> None:
        """Tells all."""
        for listener in reversed(self._listeners):
            listener.ended(error)

    def step(self, metrics: Metrics) -> bool:
        """Tells all."""
        return any([listener.step(metrics) for listener in self._listeners])

    def several(self, steps: Sequence[Metrics]) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.several(steps)

    def evaluated(self, step: int, result: EvalResult) -> bool:
        """Tells all."""
        return any([listener.evaluated(step, result) for listener in self._listeners])

    def rewound(self, step: int) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.rewound(step)

    def saving(self, step: int) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.saving(step)

    def saved(self, step: int, path: Path) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.saved(step, path)

    def evaluating(self, step: int, done: int, total: int) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.evaluating(step, done, total)

    def improved(self, step: int, metric: str, value: float) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.improved(step, metric, value)

    def stopped_early(self, step: int, evaluations: int) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.stopped_early(step, evaluations)

    def sampling(self, step: int, done: int, total: int) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.sampling(step, done, total)

    def sampled(self, step: int, samples: Sequence[Sample]) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.sampled(step, samples)

    def stopping(self, signum: int) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.stopping(signum)


class Unhurried(Audience):
    """Passes steps on some at a time, to a listener that only writes them down.

    A step of a small model takes some milliseconds, and a logger's code has left the processor's
    caches since the last one. The first step is passed on at once, and what waits before what
    could be read together with it; everything else as it comes.

    Args:
        listener: who is told; its `step` asks for no stop.
        seconds: after which a step is passed on with those that wait.
    """

    def __init__(self, listener: Listener, seconds: float = 0.5) -> None:
        super().__init__([listener])
        self._seconds = seconds
        self._waiting: list[Metrics] = []
        self._told_at = -math.inf

    def step(self, metrics: Metrics) -> bool:
        """Keeps it, or passes on all that wait."""
        self._waiting.append(metrics)
        if time.monotonic() - self._told_at >= self._seconds:
            self._tell()
        return False

    def several(self, steps: Sequence[Metrics]) -> None:
        """Behind what waits."""
        self._tell()
        super().several(steps)

    def _tell(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            super().several(waiting)
        self._told_at = time.monotonic()

    def evaluated(self, step: int, result: EvalResult) -> bool:
        """Behind what waits."""
        self._tell()
        return super().evaluated(step, result)

    def evaluating(self, step: int, done: int, total: int) -> None:
        """Behind what waits: an evaluation may take long."""
        self._tell()
        super().evaluating(step, done, total)

    def sampled(self, step: int, samples: Sequence[Sample]) -> None:
        """Behind what waits."""
        self._tell()
        super().sampled(step, samples)

    def saving(self, step: int) -> None:
        """Behind what waits: a resumed run does not take these steps again."""
        self._tell()
        super().saving(step)

    def rewound(self, step: int) -> None:
        """Behind what waits."""
        self._tell()
        super().rewound(step)

    def ended(self, error: BaseException | None) -> None:
        """Behind what waits."""
        try:
            self._tell()
        finally:
            super().ended(error)
