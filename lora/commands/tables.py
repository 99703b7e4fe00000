"""Tables as wide as a terminal, and through pipes as wide as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from lora.shaders.errors import plain

_WIDE = 4000  # columns of what is no terminal: nothing is cut or wrapped, who reads it does that


def table_console() -> Console:
    """One as wide as the terminal; for a pipe or a file as wide as the table."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDE)


class Rows:
    """Names and what they are, one below the other; without a terminal a line each."""

    def __init__(self, rows: Mapping[str, str]) -> None:
        self._rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A line ends where its text does: spaces behind it are in the way of who reads a file."""
        if not console.is_terminal:
            width = max(map(len, self._rows), default=0)
            for name, value in self._rows.items():
                yield Text(f"{name:<{width}}  {plain(value)}", no_wrap=True, overflow="ignore")
            return
        table = Table.grid(padding=(0, 2))
        table.add_column()
        table.add_column(overflow="fold")  # a path is told by its end
        for name, value in self._rows.items():
            table.add_row(Text(name, style="dim"), Text(plain(value)))
        yield table


class Records:
    """A table; where a terminal is too narrow for it, its rows one below the other.

    Args:
        headings: of the columns, that of the rows' names first; it may be empty.
        rows: as many texts each.
    """

    def __init__(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._headings, self._rows = headings, rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Nothing of it is cut, however narrow."""
        table = Table(*self._headings)
        for row in self._rows:
            table.add_row(*(Text(text) for text in row))
        wide = options.update(max_width=_WIDE)
        if console.measure(table, options=wide).maximum <= options.max_width:
            yield table
            return
        for name, *values in self._rows:
            yield Text(f"{self._headings[0]} {name}".strip(), style="bold")
            grid = Table.grid(padding=(0, 2, 0, 0))
            grid.add_column(overflow="fold")
            grid.add_column(overflow="fold")
            for heading, value in zip(self._headings[1:], values, strict=True):
                grid.add_row(Text(f"  {heading}", style="dim"), Text(value))
            yield grid


def print_rows(console: Console, rows: Mapping[str, str]) -> None:
    """Prints `Rows`."""
    console.print(Rows(rows), crop=False)


def tokens_shown(tokens: Sequence[int]) -> str:
    """Whose rows of the embedding are trained: the first few ids, and how many there are."""
    named = ", ".join(map(str, tokens[:8])) + (", …" if len(tokens) > 8 else "")
    rows = "row" if len(tokens) == 1 else "rows"
    return f"{len(tokens):,} {rows} of the embedding (token {named})"
