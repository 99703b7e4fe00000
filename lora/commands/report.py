"""The command `lora report`; lora/commands/cli.py registers it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora.shaders.errors import plain


def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of runs.")],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The page; by default report.html, of one run in its directory."
        ),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The picture; by default beside the page."),
    ] = None,
) -> None:
    """The curves of one or several runs as a page and a picture, with what differs between them."""
    from lora.commands.report_data import charts, read_runs
    from lora.commands.report_page import write_page
    from lora.commands.report_picture import can_draw, write_picture

    read = read_runs(runs)
    shown = charts(read)
    page = output or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    write_page(page, read, shown)
    print(f"Wrote {plain(str(page))}.")
    picture = png or page.with_suffix(".png")
    if png is None and not can_draw():
        print("(pip install 'webgpu-lora[report]' for the curves as a PNG, too.)")
        return
    write_picture(picture, read, shown)
    print(f"Wrote {plain(str(picture))}.")
