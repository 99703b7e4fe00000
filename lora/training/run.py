"""A training run with its files: metrics, checkpoints, evaluation, the adapter at the end."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lora.data.examples import template_source
from lora.storage.files import write_file
from lora.training.checkpoint import resume, save_checkpoint
from lora.training.listeners import Audience, Listener, MetricsFile
from lora.training.provenance import ran_on
from lora.training.session import TrainingSession

METRICS = "metrics.jsonl"
TEMPLATE = "chat_template.jinja"  # transformers' name for it
CONFIG = "config.yaml"
RUN = "run.json"  # what ran, where config.yaml has what was asked for


class Interrupted(Exception):
    """Ctrl-C: the run stopped between two steps, after a checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(str(checkpoint))
        self.checkpoint = checkpoint


def run_training(
    session: TrainingSession, *, resuming: bool = False, listeners: Sequence[Listener] = ()
) -> Path:
    """Trains to the end and writes the files of a run; returns the output directory.

    Args:
        resuming: go on from the last checkpoint of the output directory.
        listeners: who hear of steps, evaluations and files. The run stops after the step under way
            if one of them asks for it, and saves its adapter as at the end.

    Raises:
        Interrupted: the user pressed Ctrl-C; a checkpoint was saved first.
        LoraError: the loss was no longer finite; the files so far stay.
    """
    output = Path(session.config.output)
    if resuming:
        resume(session, output)
        _drop_metrics_after(output / METRICS, session.steps_done)
    else:
        _set_aside(output)
    output.mkdir(parents=True, exist_ok=True)
    write_file(output / CONFIG, session.config.dump_yaml())
    write_file(output / RUN, json.dumps(ran_on(session.device), indent=1) + "\n")
    if session.config.data.chat_template is not None:  # who runs the adapter needs it, too
        write_file(output / TEMPLATE, template_source(session.config.data.chat_template))
    audience = Audience([MetricsFile(output / METRICS), *listeners])
    with _stop_requests() as interrupted, audience.hearing(session):
        _train(session, output, audience, interrupted)
        session.save(output)
        audience.saved(session.steps_done, output)
    return output


def _train(
    session: TrainingSession, output: Path, audience: Audience, interrupted: Callable[[], bool]
) -> None:
    """The steps that are left, with their evaluations and checkpoints."""
    train = session.config.train
    asked_to_stop = False

    def due(every: int | None) -> bool:
        return every is not None and session.steps_done % every == 0

    def pauses() -> bool:
        return due(train.eval_every) or due(train.save_every) or interrupted() or asked_to_stop

    for metrics in session.steps(pause=pauses):
        if metrics is not None:
            asked_to_stop |= audience.step(metrics)
            continue
        # A pause: all steps so far have ended.
        if due(train.eval_every):
            asked_to_stop |= audience.evaluated(session.steps_done, session.evaluate())
        if due(train.save_every):
            audience.saved(session.steps_done, save_checkpoint(session, output))
        if interrupted() and session.steps_done < session.total_steps:
            path = save_checkpoint(session, output)
            audience.saved(session.steps_done, path)
            raise Interrupted(path)
        if asked_to_stop:
            return


def _set_aside(output: Path) -> None:
    """Gives a run that stands under this name another one: nothing is lost or mixed."""
    if not (output / METRICS).exists() and not (output / "checkpoints").exists():
        return
    number = 1
    while output.with_name(f"{output.name}.old-{number}").exists():
        number += 1
    os.replace(output, output.with_name(f"{output.name}.old-{number}"))


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
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C was pressed; a second one interrupts at once."""
    requested: list[float] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        if requested:
            raise KeyboardInterrupt
        requested.append(time.time())

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(requested)
    finally:
        signal.signal(signal.SIGINT, previous)
