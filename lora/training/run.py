"""A training run with its files: metrics, checkpoints, evaluation, the adapter at the end."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lora.config.durations import seconds_of
from lora.data.rows import template_source
from lora.shaders.choice import say_once
from lora.shaders.errors import DeviceMemoryError, GPUError, InputError
from lora.storage.files import write_file
from lora.training.checkpoint import checkpoints, save_checkpoint
from lora.training.endings import DeviceFullError, DeviceLostError, device_ended
from lora.training.leading import check_can_lead, follow, led, share_state
from lora.training.listeners import Audience, Listener, MetricsFile, drop_metrics_after
from lora.training.output import METRICS, RUN, check_room, owned_output
from lora.training.provenance import ran_on
from lora.training.resuming import resume
from lora.training.session import TrainingSession

TEMPLATE = "chat_template.jinja"  # transformers' name for it
CONFIG = "config.yaml"
MOST_LOSSES = 3  # of the device in one run, under train.on_device_loss: retry


# What asks a run to stop: Ctrl-C, the system or a scheduler, a terminal that is closed.
_STOPS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


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


def run_training(
    session: TrainingSession, *, resuming: bool = False, listeners: Sequence[Listener] = ()
) -> Path:
    """Trains to the end and writes the files of a run; returns the output directory.

    The end is a checkpoint, too: a finished run goes on where it is resumed with more steps. Of
    several processes, which all call this, rank 0 alone writes and tells listeners.

    Args:
        resuming: go on from the last checkpoint of the output directory.
        listeners: who hear of steps, evaluations and files. The run stops after the step under way
            if one of them asks for it, and saves its adapter as at the end.

    Raises:
        Interrupted: a signal asked for a stop; a checkpoint was saved first.
        InputError: the directory can't be had: see `owned_output`; or the disk has no room.
        LoraError: the loss was no longer finite, or the device was lost. Then, and after whatever
            else ends a run, a checkpoint is saved where that can be; a line says so.
    """
    check_can_lead(session.config, session.communicator)
    if session.communicator.rank > 0:
        signum = follow(session)
        if signum:
            raise Interrupted(Path(session.config.output), signum)
        return Path(session.config.output)
    own = owned_output(Path(session.config.output), resuming=resuming)
    with led(session), own as output:
        if resuming:
            resume(session, output)
            share_state(session)
            drop_metrics_after(output / METRICS, session.steps_done)
        check_room(session.config, output)
        return _run(session, output, listeners)


def _run(session: TrainingSession, output: Path, listeners: Sequence[Listener]) -> Path:
    """Trains in a directory that is ours."""
    write_file(output / RUN, json.dumps(ran_on(session.device), indent=1) + "\n")
    write_file(output / CONFIG, session.config.dump_yaml())
    if session.config.data.chat_template is not None:  # who runs the adapter needs it, too
        write_file(output / TEMPLATE, template_source(session.config.data.chat_template))
    audience = Audience([MetricsFile(output / METRICS), *listeners])
    with _stop_requests() as own, audience.hearing(session):
        begun_at = session.steps_done

        def interrupted() -> int | None:
            return own() or session.stop_asked or None

        try:
            _train_on(session, output, audience, interrupted)
        except Interrupted:
            raise
        except Exception as error:
            _rescue(session, output, begun_at, error)
            raise
    return output


def _train_on(
    session: TrainingSession,
    output: Path,
    audience: Audience,
    interrupted: Callable[[], int | None],
) -> None:
    """Trains; where the device is lost and that is asked for, goes on with a new one."""
    losses = 0
    while True:
        try:
            return _train(session, output, audience, interrupted)
        except (DeviceLostError, GPUError, DeviceMemoryError) as error:
            ended = device_ended(error, session.steps_done, session.device.facts.name)
            losses += 1
            stops = session.config.train.on_device_loss == "stop" or losses > MOST_LOSSES
            if stops or not isinstance(ended, DeviceLostError):
                raise ended from error
            say_once(f"{ended} The device is opened anew ({losses} of {MOST_LOSSES} times).")
        time.sleep(losses - 1)  # a driver that was lost again may need a moment
        try:
            session.reopen()
        except InputError as error:
            raise DeviceLostError(f"{ended} It could not be opened again ({error})") from error
        if checkpoints(output):
            resume(session, output)
        audience.rewound(session.steps_done)


class _Checkpoints:
    """Saves a run's checkpoints: after so many steps, or so much time since the last."""

    def __init__(self, session: TrainingSession, output: Path, audience: Audience) -> None:
        every = session.config.train.save_every
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
            self._saved = step, save_checkpoint(self._session, self._output)
            self._audience.saved(*self._saved)
        self._saved_at = time.monotonic()
        return self._saved[1]


def _train(
    session: TrainingSession,
    output: Path,
    audience: Audience,
    interrupted: Callable[[], int | None],
) -> None:
    """The steps that are left, with their evaluations and checkpoints; the end is one, too."""
    train = session.config.train
    asked_to_stop = False
    kept = _Checkpoints(session, output, audience)

    def eval_is_due() -> bool:
        return train.eval_every is not None and session.steps_done % train.eval_every == 0

    def pauses() -> bool:
        stops = interrupted() is not None or asked_to_stop
        return eval_is_due() or kept.due or stops

    for metrics in session.steps(pause=pauses):
        if metrics is not None:
            asked_to_stop |= audience.step(metrics)
            continue
        # A pause: all steps so far have ended.
        if eval_is_due():
            asked_to_stop |= audience.evaluated(session.steps_done, session.evaluate())
        if kept.due:
            kept.save()
        signum = interrupted()
        if signum is not None and session.steps_done < session.total_steps:
            raise Interrupted(kept.save(), signum)
        if asked_to_stop:
            break
    session.save(output)
    try:
        kept.save()
    except OSError as error:  # the adapter is there, and the checkpoints before it stay
        say_once(f"The last checkpoint could not be saved ({error.strerror or error}).")
    audience.saved(session.steps_done, output)


def _rescue(session: TrainingSession, output: Path, begun_at: int, error: Exception) -> None:
    """Saves a checkpoint of a run that ends badly, where there is something to save and a place."""
    session.orders.leading = False  # the others may wait for something else
    if isinstance(error, DeviceLostError) and not isinstance(error, DeviceFullError):
        last = checkpoints(output)
        there = f"the last checkpoint is {last[-1]}" if last else "there is no checkpoint"
        say_once(f"What the device held is gone; {there}.")
        return
    if session.steps_done <= begun_at:
        return
    try:
        path = save_checkpoint(session, output)
    except Exception as hindrance:  # whatever ended the run may be what hinders this, too
        say_once(f"No checkpoint could be saved ({hindrance}); those before it stay.")
    else:
        say_once(f"Saved {path} before giving up.")


@contextmanager
def _stop_requests() -> Iterator[Callable[[], int | None]]:
    """Yields which signal asked for a stop; a second one interrupts at once."""
    requested: list[int] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        if requested:
            raise KeyboardInterrupt
        requested.append(signum)

    previous = {signum: signal.signal(signum, handle) for signum in _STOPS}
    try:
        yield lambda: requested[0] if requested else None
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
