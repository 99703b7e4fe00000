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
_HALF = re.compile(r"\bf16\b")


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

    A kernel that comes out with f16 in it gets the directive that allows that.
    """
    code = _environment().get_template(f"{template}.wgsl").render(**constants)
    return f"enable f16;\n{code}" if _HALF.search(re.sub(r"//.*", "", code)) else code
