"""Checkpoints: enough to go on bit for bit, each whole or found out.

`OUTPUT/checkpoints/step-000100/` holds the adapter as PEFT saves it, the two moments of AdamW, the
position in the data, when the run began (chat templates may write the date), and the tiles of the
products, which decide in which order sums are taken. The order of an epoch follows from
(seed, epoch), so that position is all of the random state. Digests say whether its files are as
they were written, and fingerprints what it was made with.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy

from lora.adapters.peft_files import SETTINGS, WEIGHTS, save_peft_adapter
from lora.optim.guard import GuardState
from lora.shaders.choice import SETTINGS as WEBGPU_SETTINGS
from lora.shaders.choice import asked_for, say_once
from lora.shaders.device import Device
from lora.shaders.errors import InputError, LoraError
from lora.storage.files import new_directory, remove_directory, write_file
from lora.storage.tile_cache import circumstances, entry_of
from lora.training.checkpoint_state import read_checkpoint_state

if TYPE_CHECKING:
    from lora.config.schema import Config
    from lora.training.trained import Trained

FOLDER = "checkpoints"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
_NAME = re.compile(r"step-(\d{6,})")
_PIECE = 1 << 20
# Of the state: what decides what follows. The rest is compared with what is used, and said.
_DECISIVE = ("step", "started", "stream", "precision", "fingerprints", "guard", "files")


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folder = output / FOLDER
    found = [p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)] if folder.exists() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def save_checkpoint(session: Trained, output: Path) -> Path:
    """Writes a checkpoint of the steps done so far; waits for them. Returns its directory.

    Only the newest train.keep_checkpoints stay.

    Raises:
        LoraError: the adapter or its moments hold what is no number, or the device has left steps
            alone since too many in a row were not finite, or one is still to be run again.
        OSError: it can't be written; those before it stay.
    """
    if session.stream is None:
        raise ValueError("a session without training has no checkpoints")
    path = output / FOLDER / f"step-{session.steps_done:06d}"
    guard = session.guard()
    if guard.in_a_row >= GuardState.MOST_IN_A_ROW or guard.held:  # those behind were not done
        raise LoraError("The last steps were not finite and changed nothing; they are not saved.")
    flat, moments = session.checked_parameters(), session.moments()
    state = {
        "step": session.steps_done,
        "started": session.started.isoformat(),
        "stream": session.stream.state(),
        "precision": session.precision,
        "found_with": circumstances(session.device.facts),
        "webgpu": session.device.found.implementation.setting,
        "kernels": session.kernels_digest(),
        "plans": {product.key: entry_of(plan) for product, plan in session.plans.items()},
        "fingerprints": session.fingerprints(),
        "guard": guard.as_dict(),
        "processes": session.workload.processes,
    }
    session.orders.give("forget")  # behind it the run goes on as one that resumes it
    session.begin_feedback_anew()
    try:
        _write(path, session, flat, moments, state)
    except OSError as error:
        older = checkpoints(output)[:-1]
        if error.errno != errno.ENOSPC or not older:
            raise
        say_once(f"The disk is full: {output / FOLDER} keeps fewer than train.keep_checkpoints.")
        for old in older:
            remove_directory(old)
        _write(path, session, flat, moments, state)
    for old in checkpoints(output)[: -session.config.train.keep_checkpoints]:
        remove_directory(old)
    return path


def _write(
    path: Path,
    session: Trained,
    flat: np.ndarray,
    moments: dict[str, np.ndarray],
    state: dict[str, Any],
) -> None:
    """Writes the files of a checkpoint; the state, with the digests of the others, comes last."""
    with new_directory(path) as directory:
        save_peft_adapter(directory, session.layout, flat, session.config)
        write_file(directory / OPTIMIZER, safetensors.numpy.save(moments))
        state["files"] = {
            name: _digest(directory / name) for name in (WEIGHTS, SETTINGS, OPTIMIZER)
        }
        state["digest"] = _digest_of_state(state)
        write_file(directory / STATE, json.dumps(state, indent=2) + "\n")


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint's state.json holds, once all its files are found to be as written.

    Raises:
        ValueError: the checkpoint is damaged; the message says where.
    """
    try:
        state = read_checkpoint_state(path / STATE)
    except InputError as error:
        raise ValueError(str(error).removeprefix(f"{path}/").removesuffix(".")) from None
    if "files" not in state:  # of an earlier version, without digests
        return state
    if state.get("digest") != _digest_of_state(state):
        raise ValueError(f"{STATE} was changed")
    for name, digest in state["files"].items():
        try:
            changed = _digest(path / name) != digest
        except OSError as error:
            raise ValueError(f"{name}: {error.strerror}") from None
        if changed:
            raise ValueError(f"{name} was changed")
    return state


def newest_whole(output: Path) -> tuple[Path, dict[str, Any], list[tuple[Path, str]]] | None:
    """The checkpoint to go on from: the newest whose files are as they were written.

    Returns:
        Its directory, its state, and the damaged ones that are newer, with what is wrong; None
        where no checkpoint is whole.
    """
    damaged = []
    for path, state in _states(output):
        if isinstance(state, str):
            damaged.append((path, state))
        else:
            return path, state, damaged
    return None


def _states(output: Path) -> Iterator[tuple[Path, dict[str, Any] | str]]:
    """Newest first: the state of each checkpoint, or what is wrong with it."""
    for path in reversed(checkpoints(output)):
        try:
            yield path, read_state(path)
        except ValueError as error:
            yield path, str(error)


def device_of_then(config: Config, wanted: str | int | None = None) -> Device:
    """The device to go on with a run on: with `webgpu: auto`, through what its checkpoint names.

    So the kernels are those of then. Where that can't be used here any more, auto chooses anew, and
    `resume` says so.

    Args:
        config: of the run; its output directory may hold checkpoints.
        wanted: what to open in place of the config's `device`.

    Raises:
        InputError: there is no such device.
    """
    wanted = config.device if wanted is None else wanted
    found = newest_whole(Path(config.output))
    then = None if found is None else found[1].get("webgpu")
    if asked_for(config.webgpu) == "auto" and then in WEBGPU_SETTINGS:
        with suppress(InputError):
            return Device(wanted, webgpu=then)
    return Device(wanted, webgpu=config.webgpu)


def processes_of_then(output: Path) -> int | None:
    """How many processes a run was begun with, by the checkpoint to go on from; None as there."""
    found = newest_whole(output)
    return None if found is None else int(found[1].get("processes", 1))


def precision_of_then(output: Path) -> str | None:
    """ "f32" or "f16", as a run was begun, by the checkpoint to go on from; None as there."""
    found = newest_whole(output)
    return None if found is None else str(found[1].get("precision", "f32"))


def started_at(output: Path) -> datetime | None:
    """When a run began, by the checkpoint to go on from; None where there is none that says it."""
    found = newest_whole(output)
    try:
        return None if found is None else datetime.fromisoformat(found[1]["started"])
    except (ValueError, KeyError, TypeError):
        return None  # of a version that did not keep it


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _digest_of_state(state: dict[str, Any]) -> str:
    decisive = {key: state.get(key) for key in _DECISIVE}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def set_aside(path: Path) -> None:
    """Takes a damaged checkpoint out of the list without losing what is left of it."""
    with suppress(OSError):
        number = 1
        while (aside := path.with_name(f"damaged-{number}-{path.name}")).exists():
            number += 1
        os.replace(path, aside)
