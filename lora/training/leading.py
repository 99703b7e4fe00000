"""A run of several processes: rank 0 decides, writes and shows; the others do the same steps.

What rank 0 does that takes all of them, it orders first. So whatever a run does between its steps
(evaluations, checkpoints, a stop), the others need not know why.
"""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora.optim.guard import GuardState
from lora.shaders.device import Device
from lora.shaders.errors import InputError
from lora.training.checkpoint import (
    device_of_then,
    precision_of_then,
    processes_of_then,
    started_at,
)
from lora.training.communicator import Communicator
from lora.training.placement import device_of
from lora.training.session import TrainingSession

if TYPE_CHECKING:
    from lora.config.schema import Config

_STOPS = ("SIGINT", "SIGTERM", "SIGHUP")


@contextmanager
def led(session: TrainingSession) -> Iterator[None]:
    """A run that rank 0 leads, and whose end the others are told; nothing with one process.

    An error is none of what they are told here: it ends them all (`lora.training.watch`).
    """
    orders = session.orders
    orders.leading = session.communicator.size > 1
    status = 0
    try:
        yield
    except Exception as error:
        if not isinstance(getattr(error, "signum", None), int):
            orders.leading = False
            raise
        status = error.signum  # type: ignore[attr-defined]
        orders.give("end", status)
        orders.leading = False
        raise
    orders.give("end", status)
    orders.leading = False


def check_can_lead(config: Config, communicator: Communicator) -> None:
    """Refuses what several processes can't do.

    Raises:
        InputError: train.on_device_loss is retry.
    """
    if communicator.size > 1 and config.train.on_device_loss == "retry":
        raise InputError(
            "train.on_device_loss: retry: where one of several processes loses its device all end; "
            "set it to stop, and go on with --resume."
        )


def open_together(
    config: Config, communicator: Communicator, *, resuming: bool = False
) -> TrainingSession:
    """The session of a run, opened by all of its processes; rank 0 alone reads `output`.

    Args:
        resuming: it will go on from the last checkpoint there.

    Raises:
        InputError: as `TrainingSession`, or the processes would not train the same.
    """
    check_can_lead(config, communicator)
    output = Path(config.output)
    device, started, processes, precision = None, None, None, None
    if resuming and communicator.rank == 0:
        wanted = device_of(communicator, config.device, config.webgpu)
        device = device_of_then(config, wanted)
        started, processes = started_at(output), processes_of_then(output)
        precision = precision_of_then(output)
    webgpu = None if device is None else device.found.implementation.setting
    told = communicator.broadcast((webgpu, started or datetime.now(), processes, precision))
    webgpu, started, processes, precision = told
    if precision is not None and config.train.precision == "auto":
        # What the device would take now may be another: one of its drivers', or of a new version.
        train = config.train.model_copy(update={"precision": precision})
        config = config.model_copy(update={"train": train})
    if resuming and device is None:
        wanted = device_of(communicator, config.device, config.webgpu)
        device = Device(wanted, webgpu=webgpu)
    session = TrainingSession(
        config, device=device, communicator=communicator, started=started, processes=processes
    )
    if communicator.size > 1:
        check_alike(session)
    return session


def share_state(session: TrainingSession) -> None:
    """Brings the others to where a checkpoint has put rank 0."""
    if session.orders.leading and session.stream is not None:
        session.orders.give(
            "adopt", session.steps_done, session.stream.state(), dict(session.plans),
            (session.parameters(), session.moments()), session.guard(),
        )  # fmt: skip


def follow(session: TrainingSession) -> int:
    """Does what rank 0 orders until the run ends.

    Returns:
        The signal that ended it; 0 for its own end.
    """
    with _signals(session):
        while True:
            what, *values = session.communicator.broadcast(None)
            if what == "end":
                return int(values[0])
            if what == "step":
                session.take_step()
            elif what == "again":
                session.run_again()
            elif what == "evaluate":
                examples, adapted = values
                session.evaluate(examples, adapted=adapted)
            elif what == "find":
                session.find_not_finite(*values)
            elif what == "load":
                session.memory.write(session.adapter.parameters, values[0])
            elif what == "forget":
                session.begin_feedback_anew()
            elif what == "adopt":
                _adopt(session, *values)
            else:
                raise ValueError(f"an order {what!r}")


def _adopt(
    session: TrainingSession, step: int, stream: dict[str, Any], plans: Any, state: Any,
    guard: GuardState,
) -> None:  # fmt: skip
    assert session.stream is not None
    session.stream.restore(stream)
    if session.plans.keys() == plans.keys():
        session.use_plans(plans)
    flat, moments = state
    session.restore(step, flat, moments)
    session.set_guard(replace(guard, in_a_row=0))


@contextmanager
def _signals(session: TrainingSession) -> Iterator[None]:
    """A signal to this process asks rank 0 for a stop, with the next step."""

    def handle(signum: int, frame: object) -> None:
        session.stop_signal = signum

    numbers = [getattr(signal, name) for name in _STOPS if hasattr(signal, name)]
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def quiet(communicator: Communicator) -> None:
    """Leaves what is to be said once to rank 0."""
    if communicator.rank > 0:
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")


def check_alike(session: TrainingSession) -> None:
    """Refuses processes that would train something else than rank 0.

    Raises:
        InputError: for all of them: one has another config, base model or data.
    """
    mine = {
        "config": _digest(_config_of(session.config)),
        "base model": _digest(session.workload.base_digest),
        "data": _digest(session.workload.data_digest),
    }
    everyone = session.communicator.gather(mine)
    for rank, theirs in enumerate(everyone):
        differing = [name for name in mine if theirs[name] != everyone[0][name]]
        if differing:
            host = session.communicator.hosts[rank]
            raise InputError(
                f"rank {rank} on {host} has another {' and another '.join(differing)} than rank 0 "
                f"on {session.communicator.hosts[0]}: all hosts must have the same files."
            )


def _config_of(config: Config) -> dict[str, Any]:
    """What of it decides numbers, without paths, which may differ from host to host."""
    values = config.model_dump(mode="json")
    for section, key in (("model", "path"), ("model", "tokenizer"), ("adapter", "init_from")):
        values[section].pop(key)
    for key in ("train", "eval", "chat_template"):
        values["data"].pop(key, None)
    for key in ("device", "webgpu", "output"):
        values.pop(key)
    return values


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
