"""The command `lora data`; lora/commands/cli.py registers it."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:  # imported in the command: `lora --help` has no use for them
    from lora.data.examples import Example, LoadedData
    from lora.forward.text.tokenizer import Tokenizer

_SHOWN_ROWS = 3
_ROWS_OF_A_PAGE = 100
_NAMED_ROWS = 5  # of those that are left out for one reason


def data_command(
    config: Annotated[str, typer.Argument(help="A YAML config.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the config."),
    ] = None,
    evaluation: Annotated[bool, typer.Option("--eval", help="data.eval, not data.train.")] = False,
    rows: Annotated[
        int | None,
        typer.Option(min=0, help="So many first rows. Default: 3, in a page 100, in JSON all."),
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="The token ids, too.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON an example.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with every token's id.")
    ] = None,
) -> None:
    """The rows as they will be trained: their tokens, which are trained, what is cut or left out.

    Trained is what is green, or between [[ and ]] where there are no colours. Needs no device.
    """
    from lora.config.schema import load_config
    from lora.data.loading import load_data
    from lora.forward.gguf.file import GGUFFile
    from lora.forward.text.tokenizer import Tokenizer
    from lora.storage.stores import resolve_model

    loaded = load_config(config, set_ or [])
    split: Literal["train", "eval"] = "eval" if evaluation else "train"
    tokenizer = Tokenizer.open(GGUFFile(resolve_model(loaded.model.path)), loaded.model.tokenizer)
    settings = loaded.data
    if settings.streaming and not evaluation:  # there may be no end to them
        first = _ROWS_OF_A_PAGE if rows is None else max(rows, 1)
        sources = settings.sources("train")
        settings = settings.model_copy(
            update={"train": [s.model_copy(update={"max_samples": first}) for s in sources]}
        )
    data = load_data(settings, tokenizer, split, seed=loaded.train.seed)
    if as_json:
        print_json(first_rows(data, rows), tokenizer)
        return
    if html is not None:
        from lora.commands.data_page import write_page

        shown = first_rows(data, _ROWS_OF_A_PAGE if rows is None else rows)
        write_page(html, f"data.{split} of {config}", data, shown, tokenizer)
        print(f"Wrote {html}.")
        return
    if isinstance(sys.stdout, io.TextIOWrapper):  # texts have what an ASCII terminal hasn't
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console(highlight=False)
    console.soft_wrap = not console.is_terminal  # who reads a pipe cuts lines himself
    for example in first_rows(data, _SHOWN_ROWS if rows is None else rows):
        print_example(console, data, example, tokenizer, with_ids=ids)
    print_summary(console, data)


def first_rows(data: LoadedData, n_rows: int | None) -> list[Example]:
    """The examples of the first rows; of all where the number is None."""
    rows = data.examples.rows
    shown = len(rows) if n_rows is None else int(rows.searchsorted(n_rows))
    return data.examples[:shown]


def print_json(examples: Sequence[Example], tokenizer: Tokenizer) -> None:
    """A line an example: row, turn, text, ids, trained (0 or 1 each) and whether it is cut."""
    for example in examples:
        ids = example.ids.tolist()
        values = {
            "row": example.row,
            "turn": example.turn,
            "text": tokenizer.decode(ids, skip_special=False),
            "ids": ids,
            "trained": example.trained.astype(int).tolist(),
            "cut": example.cut,
        }
        line = json.dumps(values, ensure_ascii=False)
        # JSON leaves these as they are, and a terminal may take U+009B for ESC [.
        line = re.sub("[\x7f-\x9f]", lambda match: f"\\u{ord(match[0]):04x}", line)
        sys.stdout.write(line + "\n")


def print_example(
    console: Console, data: LoadedData, example: Example, tokenizer: Tokenizer, *, with_ids: bool
) -> None:
    """Writes an example out: its text, with what is trained marked, and its ids if asked for."""
    from lora.commands.data_view import heading, stretches, visible

    console.print(Text(heading(data, example), style="bold"))
    marks = console.is_terminal and not console.no_color
    text, numbers = Text(), Text(style="dim")
    for part, ids, trained in stretches(example, tokenizer):
        style = "green" if trained else ""
        opened, closed = ("[[", "]]") if trained and not marks else ("", "")
        text.append(f"{opened}{visible(part)}{closed}", style)
        numbers.append(f"{opened}{' '.join(map(str, ids))}{closed}", style)
        numbers.append(" ")
    if example.n_cut:
        text.append("[cut]", "bold red")
    console.print(text)
    if with_ids:
        console.print(numbers)
    console.print()


def print_summary(console: Console, data: LoadedData) -> None:
    """The counts, why rows are left out, and a histogram of lengths."""
    from lora.commands.data_view import histogram, left_out_rows

    console.print(Text(str(data.summary)))
    for reason, rows in left_out_rows(data).items():
        named = ", ".join(map(str, rows[:_NAMED_ROWS]))
        more = "" if len(rows) <= _NAMED_ROWS else f" and {len(rows) - _NAMED_ROWS} more"
        console.print(Text(f"left out, {reason}: row {named}{more}", style="yellow"))
    if len(data.lengths):
        console.print()
        for line in histogram(data.lengths, data.summary.max_length, console.width):
            console.print(Text(line))
