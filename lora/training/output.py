"""A run's output directory: whether it can be written, whose it is, and one process has it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lora.forward.gguf.file import GGUFFile
from lora.forward.model.architecture import Architecture
from lora.forward.text.tokenizer import Tokenizer
from lora.shaders.choice import say_once
from lora.shaders.errors import InputError, LoraError
from lora.storage.files import (
    clean_leftovers,
    is_temporary,
    make_directories,
    sync_directory,
    temporary_path,
)
from lora.storage.stores import resolve_model
from lora.training.checkpoint import FOLDER, checkpoints
from lora.training.workload import layout_of

if TYPE_CHECKING:
    from lora.config.schema import Config

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

RUN = "run.json"  # what ran; also the mark of a directory of ours
METRICS = "metrics.jsonl"
LOCK = ".lock"
# What a run leaves; before there was a run.json, two of them told a directory of ours.
_OLDER_MARKS = ("config.yaml", METRICS)
_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
FLOAT_BYTES = 4  # of what is saved
_SMALL_FILES = 1 << 18  # bytes: configs, metrics, states
_LOCKED_BYTE = 1 << 30  # on Windows a locked byte can't be read: one behind the text


def check_output(output: Path, *, resuming: bool) -> None:
    """Refuses a directory that a run can't have, before anything is loaded.

    Raises:
        InputError: it is no directory, can't be written, holds files that are not ours, or another
            process writes to it.
    """
    try:
        _check_place(output, resuming)
        if _is_there(output):
            with _locked(output):
                pass
        _try_to_write(output)
    except OSError as error:
        raise InputError(f"output: {output} cannot be used: {error.strerror}.") from error


def check_room(config: Config, output: Path) -> None:
    """Refuses a disk without room for what a run leaves, before the model is loaded.

    Raises:
        InputError: there is less; or the model is none that can be trained.
    """
    there = next(p for p in (output, *output.absolute().parents) if p.exists())
    file = GGUFFile(resolve_model(config.model.path))
    layout = layout_of(
        config, Architecture.from_gguf(file), lambda: Tokenizer.open(file, config.model.tokenizer)
    )
    kept = config.train.keep_checkpoints
    # A new checkpoint is whole before the oldest goes; each has the adapter and two moments.
    checkpoint = FLOAT_BYTES * 3 * layout.size + _SMALL_FILES
    held = min(len(checkpoints(output)), kept) if output.is_dir() else 0
    # The adapter; and the best one, of which a new one is whole before the one before goes.
    adapters = 3 if config.data.evaluates and config.train.best_metric is not None else 1
    needed = (kept + 1 - held) * checkpoint + adapters * FLOAT_BYTES * layout.size + _SMALL_FILES
    free = shutil.disk_usage(there).free
    if free < needed:
        raise InputError(
            f"output: {output} needs {needed / 2**20:,.0f} MiB for {kept} checkpoints and the "
            f"adapter, and the disk has {free / 2**20:,.0f} MiB free; make room, name another "
            "directory, or lower train.keep_checkpoints."
        )


@contextmanager
def owned_output(output: Path, *, resuming: bool) -> Iterator[Path]:
    """Yields the directory, made if need be, as long as this process alone has it.

    An earlier run that stands there is moved aside, unless it is resumed; a line says where to.

    Raises:
        InputError: see `check_output`.
    """
    begun = False  # what is refused before is the user's to mend
    try:
        _check_place(output, resuming)
        if resuming and not output.is_dir():
            yield output  # `resume` says that there is nothing
            return
        if not resuming and is_ours(output):
            _make_room(output)
        make_directories(output)
        with _locked(output):
            for folder in (output, output / FOLDER):
                clean_leftovers(folder, all_owners=True)
            begun = True
            yield output
    except OSError as error:
        ours = str(error.filename or "").startswith(str(output)) or error.errno in _OF_A_DISK
        if not begun:
            raise InputError(f"output: {output} cannot be written: {error.strerror}.") from error
        if ours:
            raise LoraError(
                f"{output} cannot be written any more: {error.strerror}. The checkpoints that are "
                "there stay; go on with --resume once that is mended."
            ) from error
        raise


def is_ours(output: Path) -> bool:
    """Whether a run of ours stands in a directory."""
    if (output / RUN).is_file() or (output / FOLDER).is_dir():
        return True
    return all((output / name).is_file() for name in _OLDER_MARKS)


def _is_there(output: Path) -> bool:
    return output.is_dir() and any(output.iterdir())


def _check_place(output: Path, resuming: bool) -> None:
    """Refuses what is no place for a run."""
    if output.exists() and not output.is_dir():
        raise InputError(f"output: {output} is a file; name a directory that is new or a run's.")
    if not output.name or output.name == "..":
        raise InputError(f"output: {str(output)!r} names no directory of its own; give it a name.")
    nearest = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise InputError(f"output: {nearest} is a file, so that {output} can't be made.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"output: {nearest} can't be written.")
    if not _is_there(output) or is_ours(output):
        return
    foreign = sorted(
        path.name
        for path in output.iterdir()
        if path.name != LOCK and not is_temporary(path.name)  # of a run killed at its first file
    )
    if foreign and resuming:
        raise InputError(f"output: {output} holds no run of ours to go on with.")
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise InputError(
            f"output: {output} holds files that no run of ours has left ({foreign[0]}{more}). Name "
            "a directory that is new, empty, or an earlier run's."
        )


def _try_to_write(output: Path) -> None:
    """Makes a directory where the run would, and takes it away: rights alone don't tell.

    Raises:
        OSError: it can't be made.
    """
    nearest = next(p for p in (output, *output.absolute().parents) if p.exists())
    tried = temporary_path(nearest / (output.name or "output"))
    tried.mkdir()
    tried.rmdir()


def _make_room(output: Path) -> None:
    """Gives a run that stands under this name another one: nothing is lost or mixed."""
    number = 1
    while output.with_name(f"{output.name}.old-{number}").exists():
        number += 1
    aside = output.with_name(f"{output.name}.old-{number}")
    with _locked(output):
        if sys.platform != "win32":  # there no directory moves while a file in it is open
            os.replace(output, aside)
    if sys.platform == "win32":
        os.replace(output, aside)
    sync_directory(output.parent)
    say_once(f"The run that stood in {output} is now in {aside}.")


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Holds the directory's lock, which the system releases if this process dies."""
    with open(output / LOCK, "a+") as file:
        if not _lock(file):
            raise InputError(_busy(output, file))
        file.seek(0)
        file.truncate()
        file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        yield
        file.truncate(0)


def _lock(file: IO[Any]) -> bool:
    try:
        if sys.platform == "win32":
            file.seek(_LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _busy(output: Path, file: IO[Any]) -> str:
    try:
        file.seek(0)
        who = json.loads(file.read())
        owner = f"process {who['process']} on {who['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        owner = "another process"
    return f"output: {owner} writes to {output}; wait for it, or name another directory."
