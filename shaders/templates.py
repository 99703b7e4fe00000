"""WGSL kernels as Jinja2 templates.

A template opens with its formula, the shapes of its bindings and the order in which it sums. Its
constants (widths, tile sizes) are literals in the rendered code, so that the compiler can unroll;
what changes from step to step is read from a uniform. Accumulators are named variables, unrolled
by the template: an indexed private array costs a factor of ten on some drivers.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

_FOLDER = Path(__file__).parent / "wgsl"
# What a kernel must enable before it may use it, in the order of their lines, by what its
# text then holds and what it must match: to look for the first takes a fiftieth of the time.
_ENABLED = {
    "f16": ("f16", re.compile(r"\bf16\b")),
    "subgroups": ("subgroup", re.compile(r"\bsubgroup[A-Z_]\w*")),
    "chromium_experimental_subgroup_matrix": (
        "subgroup", re.compile(r"\bsubgroup(Matrix|_matrix)\w*")
    ),
}  # fmt: skip
_COMMENT = re.compile(r"//.*")


@cache
def _environment() -> jinja2.Environment:
    import jinja2  # only here: what renders no kernel starts without it

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        line_comment_prefix="//#",
    )


def render(template: str, constants: dict[str, Any]) -> str:
    """The WGSL text of `shaders/wgsl/{template}.wgsl`. An unknown constant is an error.

    A kernel gets the directives that allow what comes out in it.
    """
    return with_directives(_environment().get_template(f"{template}.wgsl").render(**constants))


def with_directives(code: str) -> str:
    """WGSL with `enable` lines on top, for those of f16, subgroups and their matrices it uses."""
    there = {name: used for name, (part, used) in _ENABLED.items() if part in code}
    text = _COMMENT.sub("", code) if there else code
    names = [name for name, used in there.items() if used.search(text)]
    return "".join(f"enable {name};\n" for name in names) + code
