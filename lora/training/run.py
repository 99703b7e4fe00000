"""A training run with its files: metrics, checkpoints, evaluation, the adapter at the end."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from lora.adapters.peft_settings import SETTINGS, WEIGHTS
from lora.data.rows import template_source
from lora.shaders.choice import say_once
from lora.shaders.errors import DeviceMemoryError, GPUError, InputError
from lora.storage.files import write_file
from lora.storage.hub_upload import push
from lora.training.best import FOLDER as BEST
from lora.training.best import BestAdapter, read_best
from lora.training.card import CARD, base_repository, write_card
from lora.training.checkpoint import checkpoints, save_checkpoint
from lora.training.course import Course, Interrupted
from lora.training.endings import DeviceFullError, DeviceLostError, device_ended
from lora.training.history import History, steps_of
from lora.training.leading import check_can_lead, follow, led, share_state
from lora.training.listeners import (
    SAMPLES,
    Audience,
    Listener,
    MetricsFile,
    SamplesFile,
    Unhurried,
    drop_metrics_after,
)
from lora.training.output import METRICS, RUN, check_room, owned_output
from lora.training.provenance import ran_on
from lora.training.resuming import resume
from lora.training.saving import Checkpoints
from lora.training.session import TrainingSession

TEMPLATE = "chat_template.jinja"  # transformers' name for it
CONFIG = "config.yaml"
MOST_LOSSES = 3  # of the device in one run, under train.on_device_loss: retry


# What asks a run to stop: Ctrl-C, the system or a scheduler, a terminal that is closed.
_STOPS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


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

    Example:
        >>> with TrainingSession.from_config("lora.yaml") as session:
        ...     output = run_training(session)
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
            for name in (METRICS, SAMPLES):
                drop_metrics_after(output / name, session.steps_done)
        check_room(session.config, output)
        _run(session, output, listeners)
        if session.config.hub is not None:
            page = push_adapter(session, output, session.config.hub)
            say_once(f"Pushed the adapter to {page}.")
        return output


def _ran(session: TrainingSession) -> dict[str, Any]:
    """What stands in run.json: the device, and what the config left to it."""
    asked = session.config.train.precision
    return {**ran_on(session.device), "precision": {"asked": asked, "ran": session.precision}}


def push_adapter(session: TrainingSession, output: Path, repository: str) -> str:
    """Pushes what PEFT loads, and the card; returns the repository's page.

    Raises:
        LoraError: it could not be pushed.
    """
    names = [WEIGHTS, SETTINGS, CARD, TEMPLATE]
    files = {name: (output / name).read_bytes() for name in names if (output / name).is_file()}
    base = base_repository(session.config, session.workload.gguf_file)
    if base is not None:  # a path of this machine says nothing there
        settings = json.loads(files[SETTINGS]) | {"base_model_name_or_path": base}
        files[SETTINGS] = json.dumps(settings, indent=2).encode()
    return push(repository, files, f"Adapter after {session.steps_done} steps (webgpu-lora)")


def _run(session: TrainingSession, output: Path, listeners: Sequence[Listener]) -> None:
    """Trains in a directory that is ours."""
    write_file(output / RUN, json.dumps(_ran(session), indent=1) + "\n")
    write_file(output / CONFIG, session.config.dump_yaml())
    if session.config.data.chat_template is not None:  # who runs the adapter needs it, too
        write_file(output / TEMPLATE, template_source(session.config.data.chat_template))
    audience = Audience(
        [
            Unhurried(MetricsFile(output / METRICS)),
            SamplesFile(output / SAMPLES),
            BestAdapter(output),
            *listeners,
        ]
    )
    with _stop_requests(audience) as own, audience.hearing(session):
        begun_at = session.steps_done

        def interrupted() -> int | None:
            return own() or session.stop_asked or None

        try:
            _train_on(session, output, audience, interrupted)
        except Interrupted:
            raise
        except Exception as error:
            with suppress(Exception):  # a listener that fails now costs no checkpoint
                audience.saving(session.steps_done)
            _rescue(session, output, begun_at, error)
            raise


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


def _train(
    session: TrainingSession,
    output: Path,
    audience: Audience,
    interrupted: Callable[[], int | None],
) -> None:
    """The steps that are left, with what is due between them; the end is a checkpoint, too."""
    kept = Checkpoints(session, lambda: output, audience)
    course = Course(session, audience, kept, interrupted)
    metric = session.config.train.best_metric
    past = History.read(output / METRICS).past()  # of a run that is gone on with
    best = None if metric is None else read_best(output / BEST, metric)
    sampled = [step for step in steps_of(output / SAMPLES) if step <= session.steps_done]
    course.take_up(
        [one for one in past if one[0] <= session.steps_done], best, max(sampled, default=None)
    )
    for _ in course.run():
        pass  # the audience has heard of it
    session.save(output)
    try:
        kept.save()
    except OSError as error:  # the adapter is there, and the checkpoints before it stay
        say_once(f"The last checkpoint could not be saved ({error.strerror or error}).")
    if course.load_best(output / BEST):  # behind the checkpoint, which is of the last step
        session.save(output)
    history, work = History.read(output / METRICS), session.workload
    write_card(output, session.settled_config, work.gguf_file, history, chats=work.trains_on_chats)
    audience.saved(session.steps_done, output)


def _rescue(session: TrainingSession, output: Path, begun_at: int, error: Exception) -> None:
    """Saves a checkpoint of a run that ends badly, where there is something to save and a place."""
    session.orders.leading = False  # the others may wait for something else
    if session.communicator.size > 1:
        session.leave_steps()
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
def _stop_requests(audience: Audience) -> Iterator[Callable[[], int | None]]:
    """Yields which signal asked for a stop; a second one interrupts at once.

    The audience hears of the first at once, on a thread of its own: Python calls handlers when the
    main thread comes back to it, and a device may keep it for a whole step. Off the main thread,
    where nobody may set handlers, there are none.
    """
    requested: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        if requested:
            raise KeyboardInterrupt
        requested.append(signum)

    def tell() -> None:
        with suppress(OSError):
            for number in iter(lambda: told.recv(1), b""):
                if number[0] in _STOPS:
                    return audience.stopping(number[0])

    told, woken = socket.socketpair()
    woken.setblocking(False)
    telling = threading.Thread(target=tell, daemon=True)
    previous_fd = signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    previous = {signum: signal.signal(signum, handle) for signum in _STOPS}
    telling.start()
    try:
        yield lambda: requested[0] if requested else None
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(previous_fd)
        woken.close()
        telling.join(timeout=1)
        told.close()
