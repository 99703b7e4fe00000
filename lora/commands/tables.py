"""Tables as wide as a terminal, and through pipes as wide as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora.shaders.errors import plain

_WIDE = 4000  # columns of what is no terminal: nothing is cut or wrapped, who reads it does that


def table_console() -> Console:
    """One as wide as the terminal; for a pipe or a file as wide as the table."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDE)


def print_rows(console: Console, rows: Mapping[str, str]) -> None:
    """Names and what they are, one below the other; without a terminal a line each."""
    if not console.is_terminal:
        width = max(map(len, rows), default=0)
        for name, value in rows.items():
            console.print(Text(f"{name:<{width}}  {plain(value)}"), soft_wrap=True)
        return
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(name, style="dim"), Text(plain(value)))
    console.print(table)


def tokens_shown(tokens: Sequence[int]) -> str:
    """Whose rows of the embedding are trained: the first few ids, and how many there are."""
    named = ", ".join(map(str, tokens[:8])) + (", …" if len(tokens) > 8 else "")
    rows = "row" if len(tokens) == 1 else "rows"
    return f"{len(tokens):,} {rows} of the embedding (token {named})"
