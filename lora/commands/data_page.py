"""The page that `lora data --html` writes: every token with its id, trained ones marked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from lora.commands.data_view import heading, histogram, left_out_rows
from lora.data.examples import printable
from lora.shaders.errors import InputError
from lora.storage.files import write_file

if TYPE_CHECKING:
    from lora.data.examples import Example, LoadedData
    from lora.forward.text.tokenizer import Tokenizer

_DECODED_BEFORE = 4  # tokens decoded before one, so that its text joins on to theirs
_MOST_OF_A_CHARACTER = 4  # tokens
_FIRST_LINE = "<!doctype html><!-- written by lora data -->"
_PAGE = (
    _FIRST_LINE
    + """
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
pre { border-left: 3px solid #8888; padding: .5rem; }
.trained { background: #2a82; color: light-dark(#060, #8f8); border-radius: 3px; }
span:hover { outline: 1px solid; }
.cut { color: light-dark(#a00, #f88); font-weight: bold; }
</style>
<h1>{{ title }}</h1>
<p>{{ summary }}</p>
{% for reason, rows in left_out.items() %}<p>Left out, {{ reason }}: row {{ rows|join(", ") }}</p>
{% endfor %}<pre>{{ lengths }}</pre>
<p>Trained tokens are green; each token tells its id.</p>
{% for example in examples %}<h2>{{ example.heading }}</h2>
<pre>{% for id, text, trained in example.tokens -%}
<span title="{{ id }}"{% if trained %} class="trained"{% endif %}>{{ text }}</span>
{%- endfor %}{% if example.cut %}<span class="cut">[cut]</span>{% endif %}</pre>
{% endfor %}</html>
"""
)


def write_page(
    path: Path, title: str, data: LoadedData, examples: Sequence[Example], tokenizer: Tokenizer
) -> None:
    """Writes the page.

    Args:
        path: the file; one that was written here is replaced.
        title: of the page.
        data: the whole data set.
        examples: those to show.
        tokenizer: the model's.

    Raises:
        InputError: another file is there, or it can't be written.
    """
    _check_replaceable(path)
    environment = jinja2.Environment(autoescape=True, trim_blocks=False)
    page = environment.from_string(_PAGE).render(
        title=title,
        summary=str(data.summary),
        left_out=left_out_rows(data),
        lengths="\n".join(histogram(data.lengths, data.summary.max_length, 80))
        if len(data.lengths)
        else "",
        examples=[
            {
                "heading": heading(data, example),
                "tokens": _tokens(example, tokenizer),
                "cut": example.n_cut,
            }
            for example in examples
        ],
    )
    try:
        write_file(path, page)
    except OSError as error:
        raise InputError(f"--html: {path} cannot be written ({error.strerror}).") from error


def _check_replaceable(path: Path) -> None:
    """Refuses to write over what isn't ours."""
    if path.is_dir():
        raise InputError(f"--html: {path} is a directory; name a file, such as data.html.")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_FIRST_LINE)) != _FIRST_LINE.encode():
                raise InputError(f"--html: {path} is there already; name another file.")


def _tokens(example: Example, tokenizer: Tokenizer) -> list[tuple[int, str, bool]]:
    """(id, text, trained) a token; a character of several tokens stands at its last one."""
    ids = example.ids.tolist()
    found: list[tuple[int, str, bool]] = []
    shown = 0  # tokens whose text is written
    for place, (token, trained) in enumerate(zip(ids, example.trained.tolist(), strict=True)):
        first = max(0, shown - _DECODED_BEFORE)
        before = tokenizer.decode(ids[first:shown], skip_special=False)
        text = tokenizer.decode(ids[first : place + 1], skip_special=False)[len(before) :]
        whole = not text.endswith("\ufffd") or place - shown >= _MOST_OF_A_CHARACTER
        shown_text = "\n".join(map(printable, text.split("\n"))) if whole else ""
        found.append((token, shown_text, trained))
        shown = place + 1 if whole else shown
    return found
