"""Pieces of raw rows to pieces of tokens: what a process of the pool does, and nothing else does.

`tokenize_piece` is the one place where rows are parsed, rendered and tokenized for training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from lora.data.masks import MaskedTokens, TextTokenizer
from lora.data.readers import parsed_line
from lora.data.records import check_record
from lora.data.rows import RowTokenizer
from lora.data.shapes import Shape
from lora.data.sources import Piece
from lora.data.table import (
    DROPPED,
    NO_TURN,
    NO_WEIGHT,
    TOO_LONG,
    UNTRAINED,
    USED,
    TokenizedPiece,
)
from lora.shaders.errors import InputError

if TYPE_CHECKING:
    from lora.config.data_section import DataConfig


@dataclass(frozen=True)
class Task:
    """How the rows of a source are tokenized; goes to the processes of the pool.

    Attributes:
        settings: the config's `data:`.
        shape: of the rows.
        is_pieces: the rows are pieces of plain text: nothing ends them.
        now: what chat templates take for the time; None for the clock.
    """

    settings: DataConfig
    shape: Shape
    is_pieces: bool
    now: datetime | None


class PieceTokenizer:
    """Tokenizes pieces of one source.

    Args:
        task: what is to be done.
        tokenizer: the model's.

    Raises:
        InputError: data.chat_template or data.chat_template_kwargs is wrong.
    """

    def __init__(self, task: Task, tokenizer: TextTokenizer) -> None:
        settings = task.settings
        if task.is_pieces and settings.append_eos == "auto":
            settings = settings.model_copy(update={"append_eos": "off"})
        self.settings, self.shape = settings, task.shape
        self.rows = RowTokenizer(settings, tokenizer, task.shape.data_format, task.now)


@dataclass
class _Example:
    """An example before it is laid into arrays."""

    ids: list[int]
    trained: list[bool]
    turn: int
    part: int = 0
    n_cut: int = 0
    cut: bool = False


def tokenize_piece(
    tokenizer: PieceTokenizer, piece: Piece, before_row: Callable[[Any], None] | None = None
) -> TokenizedPiece:
    """Parses, checks, renders, tokenizes, masks and cuts a piece's rows.

    Runs in a process of the pool (lora/data/worker.py), or in this one where rows are few or a
    tokenizer can't be sent. A wrong row ends it: the result then has `error` alone.

    Args:
        tokenizer: of the source.
        piece: of its rows.
        before_row: is given each raw row before it is looked at; sets what a row may take.
    """
    examples: list[_Example] = []
    example_rows: list[int] = []
    text_rows: list[int] = []
    text_lengths: list[int] = []
    reasons: list[int] = []
    ignored: dict[str, None] = {}
    for row, raw in enumerate(piece.rows):
        if before_row is not None:
            before_row(raw)
        try:
            values = parsed_line(raw) if isinstance(raw, bytes) else raw
            record = check_record(values, tokenizer.shape, tokenizer.settings.train_on)
            ignored |= dict.fromkeys(record.ignored)
            masked, reason = _masked(tokenizer.rows, record.columns)
            n_before = len(examples)
            for tokens in masked:
                text_rows.append(row)
                text_lengths.append(len(tokens.ids))
                found, reason = _within(tokens, tokenizer.settings, reason)
                examples += found
        except InputError as error:
            return _failed(piece, row, str(error))
        except RecursionError:
            return _failed(piece, row, "nested too deeply.")
        example_rows += [row] * (len(examples) - n_before)
        reasons.append(USED if len(examples) > n_before else reason)
    arrays = {
        "ids": np.array([i for e in examples for i in e.ids], np.int32),
        "trained": np.array([t for e in examples for t in e.trained], np.bool_),
        "lengths": np.array([len(e.ids) for e in examples], np.int32),
        "n_trained": np.array([sum(e.trained) for e in examples], np.int32),
        "rows": np.array(example_rows, np.int32),
        "turns": np.array([e.turn for e in examples], np.int32),
        "parts": np.array([e.part for e in examples], np.int32),
        "n_cut": np.array([e.n_cut for e in examples], np.int32),
        "cut": np.array([e.cut for e in examples], np.bool_),
        "text_rows": np.array(text_rows, np.int32),
        "text_lengths": np.array(text_lengths, np.int32),
        "reasons": np.array(reasons, np.int8),
        "numbers": np.array(piece.numbers, np.int64),
    }
    return TokenizedPiece(arrays, piece.label, tuple(ignored))


def _failed(piece: Piece, row: int, reason: str) -> TokenizedPiece:
    return TokenizedPiece({}, piece.label, (), f"{piece.label} {piece.numbers[row]}: {reason}")


def _masked(rows: RowTokenizer, columns: Mapping[str, Any]) -> tuple[list[MaskedTokens], int]:
    """A record's tokens, and why it is left out if none of them is trained."""
    if columns.get("weight") == 0 or columns.get("train") is False:
        return [], NO_WEIGHT
    return rows.tokenize(columns), UNTRAINED


def _within(tokens: MaskedTokens, settings: DataConfig, reason: int) -> tuple[list[_Example], int]:
    """A text as examples of at most data.max_length tokens, and why there is none.

    Raises:
        InputError: it is longer, and data.overflow is error.
    """
    ids, trained, limit = tokens.ids, tokens.trained, settings.max_length
    turn = NO_TURN if tokens.turn is None else tokens.turn
    if len(ids) <= limit:
        return ([_Example(ids, trained, turn)] if True in trained else []), reason
    if settings.overflow == "error":
        raise InputError(
            f"has {len(ids)} tokens, and data.max_length is {limit}: raise it, or say with "
            "data.overflow what becomes of longer rows (cut, drop or split)."
        )
    if settings.overflow == "drop":
        return [], DROPPED if True in trained else reason
    if settings.overflow == "split":
        return list(_split(ids, trained, turn, limit)), reason
    if True in trained[:limit]:
        # A row that loses only what isn't trained, as ChatML's last line break, is whole.
        cut = True in trained[limit:]
        return [_Example(ids[:limit], trained[:limit], turn, 0, len(ids) - limit, cut)], reason
    return [], TOO_LONG if True in trained else reason


def _split(ids: list[int], trained: list[bool], turn: int, limit: int) -> Iterator[_Example]:
    """Stretches of a text, each beginning with the last token of that before it.

    So every trained token is predicted once, if only from its own stretch.
    """
    for part, start in enumerate(range(0, len(ids) - 1, limit - 1)):
        marks = [False, *trained[start + 1 : start + limit]]
        if True in marks:
            yield _Example(ids[start : start + limit], marks, turn, part)
