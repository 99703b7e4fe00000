"""Tokenized data kept on disk: what was tokenized once is read from there."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora.data.table import TableWriter, TokenizedPiece, TokenTable
from lora.shaders.errors import InputError
from lora.storage.files import new_directory
from lora.storage.tile_cache import cache_folder

if TYPE_CHECKING:
    from lora.data.pieces import Task
    from lora.forward.text.tokenizer import TokenizerOrigin

_KEPT_SECONDS = 30 * 24 * 3600  # what was not used for so long is deleted
# The settings that decide a row's tokens; others change with no effect on what is kept.
_SETTINGS = (
    "max_length", "overflow", "chat_template", "chat_template_kwargs", "train_on",
    "roles_to_train", "train_on_eos", "append_eos",
)  # fmt: skip
_ROOMS = ("data", "forward/text")  # whose code decides them, too


def folder_of_tables() -> Path:
    """Where they lie: in the user's folder of caches."""
    return cache_folder() / "data"


def key_of(task: Task, data: str, tokenizer: TokenizerOrigin, date: str) -> str:
    """The name under which a source's tokens are kept.

    Args:
        task: what is done; data.chat_template in it is a text.
        data: of the rows, by their contents.
        tokenizer: the model's.
        date: what the template writes of the time; "" for nothing.
    """
    settings = {name: getattr(task.settings, name) for name in _SETTINGS}
    parts: list[Any] = [
        settings, task.shape, task.is_pieces, data, tokenizer.digest(), date, _code_digest(),
    ]  # fmt: skip
    return hashlib.sha256(repr(parts).encode(errors="backslashreplace")).hexdigest()[:32]


def kept(key: str) -> TokenTable | None:
    """A table that was kept; None where there is none, or a damaged one."""
    folder = folder_of_tables() / key
    try:
        table = TokenTable.load(folder)
        (folder / "used").touch()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return table


def keep(key: str, pieces: Iterator[TokenizedPiece], data_format: str, dated: bool) -> TokenTable:
    """Writes pieces as they come, and maps what was written.

    Raises:
        InputError: the disk has no room, or the folder can't be written to; or a row is wrong.
    """
    folder = folder_of_tables() / key
    try:
        _forget_unused()
        with new_directory(folder) as directory, TableWriter(directory) as writer:
            for piece in pieces:
                if piece.error is not None:
                    raise InputError(piece.error)
                writer.add(piece)
            writer.finish(data_format, dated)
            (directory / "used").touch()
        return TokenTable.load(folder)
    except OSError as error:
        table = kept(key)  # of another run that was quicker
        if table is not None:
            return table
        raise InputError(
            f"{folder.parent}: tokenized data can't be kept there ({error.strerror}). Make room, "
            "or name another folder with XDG_CACHE_HOME."
        ) from error


def _forget_unused() -> None:
    """Deletes what was not used for a month."""
    for mark in folder_of_tables().glob("*/used"):
        with suppress(OSError):
            if time.time() - mark.stat().st_mtime > _KEPT_SECONDS:
                shutil.rmtree(mark.parent)


def _code_digest() -> str:
    """Of the code that makes tokens, and of the libraries that it asks."""
    import jinja2
    import tokenizers

    import lora

    digest = hashlib.sha256(f"{jinja2.__version__} {tokenizers.__version__}".encode())
    for room in _ROOMS:
        for file in sorted((Path(lora.__file__).parent / room).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
