"""Tables on terminals of any width, and through pipes."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lora.commands.tables import Records, Rows

ROWS = {"model": "models/SmolLM2-135M-Instruct.Q4_1.gguf (30 layers)", "steps": "20"}
HEADINGS = ("", "loss", "perplexity", "token accuracy", "exact match")
RESULTS = [
    ("base, commands", "1.6220", "5.063", "66.4%", "10/12 (83.3%)"),
    ("adapter, [red]commands", "1.3703", "3.937", "68.1%", "11/12 (91.7%)"),
]


def printed(part: Rows | Records, width: int, *, terminal: bool = True) -> list[str]:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, no_color=True
    )
    console.print(part, crop=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [120, 80, 40, 20])
def test_nothing_is_cut(width: int) -> None:
    lines = printed(Rows(ROWS), width)
    assert all(len(line) <= width for line in lines)
    text = "".join("".join(line.split()) for line in lines)
    assert "…" not in text and text.endswith("steps20")
    assert "Q4_1" in text or width == 20  # there a line ends within it
    lines = printed(Records(HEADINGS, RESULTS), width)
    text = "".join("".join(line.split()) for line in lines)
    assert all(len(line) <= width for line in lines) and "…" not in text
    for word in ("adapter,[red]commands", "1.3703", "tokenaccuracy", "11/12(91.7%)"):
        assert word in text or width == 20


def test_a_narrow_terminal_gets_a_record_a_row() -> None:
    lines = [line.rstrip() for line in printed(Records(HEADINGS, RESULTS), 40)]
    assert lines[:3] == ["base, commands", "  loss            1.6220", "  perplexity      5.063"]
    assert printed(Records(HEADINGS, RESULTS), 100)[0].startswith("┏")


def test_lines_without_a_terminal_end_where_their_text_does() -> None:
    assert printed(Rows(ROWS), 30, terminal=False) == [
        f"model  {ROWS['model']}", "steps  20"
    ]  # fmt: skip
