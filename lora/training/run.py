"""A training run with its files: metrics, checkpoints, evaluation, the adapter at the end."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lora.data.rows import template_source
from lora.shaders.choice import say_once
from lora.storage.files import write_file
from lora.training.checkpoint import resume, save_checkpoint
from lora.training.listeners import Audience, Listener, MetricsFile
from lora.training.output import METRICS, RUN, owned_output
from lora.training.provenance import ran_on
from lora.training.session import TrainingSession

TEMPLATE = "chat_template.jinja"  # transformers' name for it
CONFIG = "config.yaml"


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

    Args:
        resuming: go on from the last checkpoint of the output directory.
        listeners: who hear of steps, evaluations and files. The run stops after the step under way
            if one of them asks for it, and saves its adapter as at the end.

    Raises:
        Interrupted: a signal asked for a stop; a checkpoint was saved first.
        InputError: the directory can't be had: see `owned_output`.
        LoraError: the loss was no longer finite. Then, and after whatever else ends a run, a
            checkpoint is saved where that can be; a line says so.
    """
    with owned_output(Path(session.config.output), resuming=resuming) as output:
        if resuming:
            resume(session, output)
            _drop_metrics_after(output / METRICS, session.steps_done)
        return _run(session, output, listeners)


def _run(session: TrainingSession, output: Path, listeners: Sequence[Listener]) -> Path:
    """Trains in a directory that is ours."""
    write_file(output / CONFIG, session.config.dump_yaml())
    write_file(output / RUN, json.dumps(ran_on(session.device), indent=1) + "\n")
    if session.config.data.chat_template is not None:  # who runs the adapter needs it, too
        write_file(output / TEMPLATE, template_source(session.config.data.chat_template))
    audience = Audience([MetricsFile(output / METRICS), *listeners])
    with _stop_requests() as interrupted, audience.hearing(session):
        begun_at = session.steps_done
        try:
            _train(session, output, audience, interrupted)
        except Interrupted:
            raise
        except Exception:
            _rescue(session, output, begun_at)
            raise
        session.save(output)
        audience.saved(session.steps_done, output)
    return output


def _train(
    session: TrainingSession,
    output: Path,
    audience: Audience,
    interrupted: Callable[[], int | None],
) -> None:
    """The steps that are left, with their evaluations and checkpoints."""
    train = session.config.train
    asked_to_stop = False

    def due(every: int | None) -> bool:
        return every is not None and session.steps_done % every == 0

    def pauses() -> bool:
        stops = interrupted() is not None or asked_to_stop
        return due(train.eval_every) or due(train.save_every) or stops

    for metrics in session.steps(pause=pauses):
        if metrics is not None:
            asked_to_stop |= audience.step(metrics)
            continue
        # A pause: all steps so far have ended.
        if due(train.eval_every):
            asked_to_stop |= audience.evaluated(session.steps_done, session.evaluate())
        if due(train.save_every):
            audience.saved(session.steps_done, save_checkpoint(session, output))
        signum = interrupted()
        if signum is not None and session.steps_done < session.total_steps:
            path = save_checkpoint(session, output)
            audience.saved(session.steps_done, path)
            raise Interrupted(path, signum)
        if asked_to_stop:
            return


def _rescue(session: TrainingSession, output: Path, begun_at: int) -> None:
    """Saves a checkpoint of a run that ends badly, where there is something to save and a place."""
    if session.steps_done == begun_at:
        return
    try:
        path = save_checkpoint(session, output)
    except Exception as error:  # whatever ended the run may be what hinders this, too
        say_once(f"No checkpoint could be saved ({error}); those before it stay.")
    else:
        say_once(f"Saved {path} before giving up.")


def _drop_metrics_after(path: Path, step: int) -> None:
    """Leaves the lines up to a step; what came after it will be trained again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            break  # a crash left half a line
        if values["step"] <= step:
            kept.append(line + "\n")
    write_file(path, "".join(kept))


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
