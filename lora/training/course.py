"""A run from its first step to its last: steps, evaluations, samples, checkpoints, its end."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora.config.durations import epochs_of
from lora.shaders.errors import InputError
from lora.training.best import Best, EarlyStop, better
from lora.training.listeners import Audience, Listener
from lora.training.metrics import EvalResult, Metrics, Sample
from lora.training.output import owned_output
from lora.training.saving import Checkpoints

if TYPE_CHECKING:
    from lora.training.trained import Trained

_ROUNDING = 1e-9  # of an epoch that is put together of steps


class Interrupted(Exception):
    """A signal: the run stopped between two steps, after a checkpoint.

    Attributes:
        checkpoint: where it lies.
        signum: of the signal.
    """

    def __init__(self, checkpoint: Path, signum: int = signal.SIGINT) -> None:
        super().__init__(str(checkpoint))
        self.checkpoint = checkpoint
        self.signum = signum


class _Stopped(Exception):
    """An evaluation that a signal ends."""


class Due:
    """Whether something that comes every N steps or epochs comes after the steps done.

    Args:
        every: steps, epochs as a text, or None for never.
        key: of the config, for messages.

    Raises:
        InputError: a part of an epoch, of rows that nobody has counted.
    """

    def __init__(self, session: Trained, every: int | str | None, key: str) -> None:
        self._session = session
        self._steps = every if isinstance(every, int) else None
        self._epochs = epochs_of(every) if isinstance(every, str) else None
        part = self._epochs is not None and self._epochs != int(self._epochs)
        if part and session.workload.streamed is not None:
            raise InputError(
                f"{key}: {every}: rows that are streamed are not counted, so that a part of an "
                "epoch can't be told; give steps or whole epochs."
            )
        self._passed = self._whole()

    def _whole(self) -> int:
        if self._epochs is None or self._session.stream is None:
            return 0
        return math.floor(self._session.stream.epoch / self._epochs + _ROUNDING)

    @property
    def now(self) -> bool:
        """Whether it is due."""
        if self._steps is not None:
            return self._session.steps_done % self._steps == 0
        return self._whole() > self._passed

    def done(self) -> None:
        """It was done, if it was due."""
        self._passed = self._whole()


class Course:
    """Takes a session through the steps that are left, and does what is due between them.

    Args:
        session: with training.
        audience: who hear of all.
        checkpoints: saves them.
        interrupted: gives the signal that asks for a stop.
    """

    def __init__(
        self,
        session: Trained,
        audience: Listener,
        checkpoints: Checkpoints,
        interrupted: Callable[[], int | None] = lambda: None,
    ) -> None:
        train = session.config.train
        self._session, self._audience, self._checkpoints = session, audience, checkpoints
        self._interrupted = interrupted
        self._evaluates = bool(session.workload.eval_examples)
        self._eval = Due(session, train.eval_every, "train.eval_every")
        self._sample = Due(session, train.sample_every, "train.sample_every")
        self._metric = train.best_metric if self._evaluates else None
        self._patience = EarlyStop(
            self._metric or "", train.early_stopping_patience, train.early_stopping_threshold
        )
        self._asked_to_stop = False
        self._evaluated_at: int | None = None
        self._sampled_at: int | None = None
        self.best: Best | None = None
        self._best_parameters: np.ndarray | None = None

    def take_up(
        self,
        past: Sequence[tuple[int, dict[str, float]]],
        best: Best | None,
        sampled_at: int | None = None,
    ) -> None:
        """Goes on with what a run was.

        Args:
            past: its evaluations by step.
            best: the best of them.
            sampled_at: after which step prompts were answered last.
        """
        self.best, self._sampled_at = best, sampled_at
        if past:
            self._evaluated_at = past[-1][0]
        if self._metric is not None:
            self._patience.replay([m[self._metric] for _, m in past if self._metric in m])

    def run(self) -> Iterator[Metrics]:
        """The steps that are left, in order.

        Raises:
            Interrupted: a signal asked for a stop; a checkpoint was saved first.
        """
        session = self._session
        if session.steps_done == 0:
            if session.config.train.eval_at_start:
                self._evaluate()
            self._answer()
            self._check_interrupts()
        if not self._asked_to_stop:
            yield from self._steps()
        self._evaluate()
        self._answer()

    def _steps(self) -> Iterator[Metrics]:
        session, kept = self._session, self._checkpoints
        for metrics in session.steps(pause=self._pauses):
            if metrics is not None:
                self._asked_to_stop |= self._audience.step(metrics)
                yield metrics
                continue
            # A pause: all steps so far have ended.
            if self._eval.now:
                self._evaluate()
            if self._sample.now:
                self._answer()
            self._eval.done()
            self._sample.done()
            if kept.due:
                kept.save()
            self._check_interrupts()
            if self._asked_to_stop:
                break

    def _check_interrupts(self) -> None:
        """Ends the run where a signal asks for it and there is something left to do."""
        signum = self._interrupted()
        if signum is not None and self._session.steps_done < self._session.total_steps:
            raise Interrupted(self._checkpoints.save(), signum)

    def _pauses(self) -> bool:
        stops = self._interrupted() is not None or self._asked_to_stop
        return self._eval.now or self._sample.now or self._checkpoints.due or stops

    def _evaluate(self) -> None:
        """Evaluates the adapter as it is, unless that was done or a signal ends it."""
        session, step = self._session, self._session.steps_done
        if not self._evaluates or self._evaluated_at == step:
            return

        def progress(done: int, total: int) -> None:
            self._audience.evaluating(step, done, total)
            # Of several processes the others would wait for the rest of it.
            if self._interrupted() is not None and session.communicator.size == 1:
                raise _Stopped

        self._audience.evaluating(step, 0, len(session.workload.eval_examples))
        try:
            result: EvalResult = session.evaluate(progress=progress)
        except _Stopped:
            return
        self._evaluated_at = step
        value = None if self._metric is None else result.metrics()[self._metric]
        if value is not None:
            self._keep_if_best(step, value)
        self._asked_to_stop |= self._audience.evaluated(step, result)
        if value is not None and self._patience.stops(value) and step < session.total_steps:
            self._asked_to_stop = True
            self._audience.stopped_early(step, self._patience.without_gain)

    def _keep_if_best(self, step: int, value: float) -> None:
        metric, best = self._metric, self.best
        if metric is None or not math.isfinite(value):
            return
        if best is not None and not better(metric, value, best.value):
            return
        self.best = Best(metric, value, step)
        if self._session.config.train.load_best_model_at_end:
            self._best_parameters = self._session.checked_parameters()
        self._audience.improved(step, metric, value)

    def _answer(self) -> None:
        """Lets the model answer train.sample_prompts, unless that was done."""
        session, step = self._session, self._session.steps_done
        train = session.config.train
        if not train.sample_prompts or self._sampled_at == step:
            return
        samples: list[Sample] = []
        for prompt in train.sample_prompts:
            if self._interrupted() is not None:
                return
            self._audience.sampling(step, len(samples), len(train.sample_prompts))
            written: Any = prompt
            if isinstance(prompt, str) and session.workload.trains_on_chats:
                written = [{"role": "user", "content": prompt}]
            samples.append(
                Sample(prompt, session.generate(written, max_tokens=train.sample_tokens))
            )
        self._sampled_at = step
        self._audience.sampled(step, samples)

    def load_best(self, folder: Path | None = None) -> bool:
        """Puts the best adapter in place of the last one, where that is asked for.

        Args:
            folder: where one lies that an earlier part of the run saved.

        Returns:
            Whether it was another.
        """
        session = self._session
        if not session.config.train.load_best_model_at_end or self.best is None:
            return False
        if self.best.step == session.steps_done:
            return False
        if self._best_parameters is not None:
            session.set_parameters(self._best_parameters)
            return True
        if folder is not None and folder.is_dir():
            session.load_adapter(folder)
            return True
        return False


class _Evaluations(Listener):
    """Writes down what was evaluated."""

    def __init__(self, into: list[tuple[int, EvalResult]]) -> None:
        self._into = into

    def evaluated(self, step: int, result: EvalResult) -> bool:
        """One more."""
        self._into.append((step, result))
        return False


def train(session: Trained, listeners: Sequence[Listener]) -> Iterator[Metrics]:
    """See `TrainingSession.train`."""
    with ExitStack() as stack:
        audience = Audience([_Evaluations(session.evaluations), *listeners])
        stack.enter_context(audience.hearing(session))
        place = Path(session.config.output)
        resuming = session.steps_done > 0 and place.is_dir()

        @cache
        def output() -> Path:
            return stack.enter_context(owned_output(place, resuming=resuming))

        # Several processes would write over each other, and at times of their own.
        saves = session.communicator.size == 1
        course = Course(session, audience, Checkpoints(session, output, audience, saves=saves))
        past = [(step, result.metrics()) for step, result in session.evaluations]
        course.take_up([one for one in past if one[0] <= session.steps_done], None)
        yield from course.run()
        course.load_best()
