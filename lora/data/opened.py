"""Sources whose rows' shape is known, by the first of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from lora.data.readers import parsed_line
from lora.data.records import check_record
from lora.data.shapes import Shape, shape_of
from lora.data.sources import RowSource
from lora.shaders.errors import InputError

if TYPE_CHECKING:
    from lora.config.data_section import DataConfig


@dataclass(frozen=True)
class OpenedSource:
    """A source whose rows' shape is known.

    Attributes:
        rows: raw.
        shape: by the first of them.
        weight: how often an epoch takes them.
    """

    rows: RowSource
    shape: Shape
    weight: float = 1.0


def opened(
    rows: RowSource, data_format: str, columns: dict[str, str], weight: float = 1.0
) -> OpenedSource:
    """A source with the shape that its first row has.

    Raises:
        InputError: there are no rows, or the first is of no shape that is known.
    """
    first = rows.first()
    if first is None:
        raise InputError(f"{rows.name}: holds no rows.")
    try:
        values = first.rows[0]
        values = parsed_line(values) if isinstance(values, bytes) else values
        shape = shape_of(values, data_format, columns)
    except InputError as error:
        raise InputError(f"{first.label} {first.numbers[0]}: {error}") from None
    return OpenedSource(rows, shape, weight)


def check_settings_of_chats(settings: DataConfig, data_format: str) -> None:
    """Refuses what would do nothing.

    Raises:
        InputError: a setting is given that only chats have a use for.
    """
    for name in ("chat_template", "chat_template_kwargs", "roles_to_train"):
        if getattr(settings, name) != type(settings).model_fields[name].default:
            raise InputError(
                f"data.{name} is for chats, and the rows are of the format {data_format}: leave it "
                "out, or write the rows as messages."
            )


def first_records(
    rows: RowSource, data_format: str, columns: dict[str, str], n_rows: int
) -> tuple[Shape, list[Any]]:
    """The shape of a source, and its first rows' values."""
    source = opened(rows, data_format, columns)
    values = (row for piece in rows.pieces() for row in piece.rows)
    found = [parsed_line(v) if isinstance(v, bytes) else v for v in islice(values, n_rows)]
    return source.shape, found


def checked_records(rows: RowSource) -> tuple[str, int]:
    """The format of a source's rows, and how many there are.

    Raises:
        InputError: one of them is wrong.
    """
    shape, n_rows = opened(rows, "auto", {}).shape, 0
    for piece in rows.pieces():
        for number, raw in zip(piece.numbers, piece.rows, strict=True):
            try:
                check_record(parsed_line(raw) if isinstance(raw, bytes) else raw, shape)
            except InputError as error:
                raise InputError(f"{piece.label} {number}: {error}") from None
            n_rows += 1
    return shape.data_format, n_rows
