"""What docs, docstrings and comments name is there: files, commands, options, rooms."""

from __future__ import annotations

import re
from functools import cache

import pytest
import typer

from lora.commands.cli import app
from tests.support.imports import MAY_IMPORT, REPOSITORY, ROOMS, homes_graph

DOCS = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/log.md",
        "benchmarks/README.md")  # fmt: skip
ROOTS = "lora|forward|backward|optim|shaders|tests|benchmarks|docs|configs|scripts|decode|parts"
# `forward/rope.py`, `decode/q4_0.wgsl`, `matmul_row.wgsl`; not what has a placeholder such as NAME.
PATH = re.compile(rf"(?<![\w./-])(?:(?:{ROOTS})/[\w./-]+\.[a-z]+|\w+\.wgsl)\b")
SPAN = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)


@cache
def files() -> tuple[str, ...]:
    """The project's own files, by their paths from its root."""
    folders = (*ROOMS, "benchmarks", "configs", "docs", "scripts", "tests")
    paths = (path for folder in folders for path in (REPOSITORY / folder).rglob("*.*"))
    return tuple(path.relative_to(REPOSITORY).as_posix() for path in paths if path.is_file())


def names_a_file(path: str, home: str) -> bool:
    """Whether a path is one from the root, from the file that names it, or of a kernel."""
    if re.search(r"[A-Z]{4}", path.replace("README", "").replace("CONTRIBUTING", "")):
        return True  # a placeholder
    folders = (REPOSITORY, (REPOSITORY / home).parent, REPOSITORY / "shaders/wgsl")
    if any((folder / path).is_file() for folder in folders):
        return True
    return "/" not in path and any(name.endswith(f"/{path}") for name in files())


def test_paths_exist() -> None:
    """In the docs, and in docstrings and comments of code."""
    made = "tests/test_package.py"  # names files that it makes
    code = [n for n in files() if n.endswith((".py", ".wgsl", ".sh", ".yaml")) and n != made]
    missing = [
        f"{home}: {path}"
        for home in (*DOCS, *code)
        for path in PATH.findall((REPOSITORY / home).read_text())
        if not names_a_file(path, home)
    ]
    assert missing == []


@pytest.mark.parametrize("home", DOCS)
def test_commands_exist(home: str) -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for span in SPAN.findall((REPOSITORY / home).read_text()):
        for target in re.findall(r"(?:^|[`\n])make ([a-z-]+)", span):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
        for name in re.findall(r"(?:^|[`\n])lora ([a-z-]+)", span):
            assert name.startswith("-") or name in commands, f"lora {name}"


@pytest.mark.parametrize("home", DOCS)
def test_benchmarks_have_the_options_that_docs_give_them(home: str) -> None:
    for span in SPAN.findall((REPOSITORY / home).read_text()):
        lines = span.replace("\\\n", " ").strip("`").splitlines()
        for line in lines:
            called = re.search(r"(?:benchmarks/|…)(\w+\.py)(.*)", line)
            if called is None:
                continue
            script = (REPOSITORY / "benchmarks" / called[1]).read_text()
            for option in re.findall(r"--[a-z-]+", called[2]):
                assert f'"{option}"' in script, f"{called[1]} {option}"


def test_the_picture_shows_all_rooms_and_their_imports() -> None:
    """Every import is a path of arrows, and every arrow an import that is allowed."""
    text = (REPOSITORY / "docs/architecture.md").read_text()
    picture = re.search(r"```mermaid\n(.*?)```", text, re.DOTALL)
    assert picture is not None
    arrows: dict[str, set[str]] = {}
    for left, right in re.findall(r"^ *(\w+) --> (.+)$", picture[1], re.MULTILINE):
        below = {name.strip().replace("_", "/") for name in right.split("&")}
        arrows.setdefault(left.replace("_", "/"), set()).update(below)
    assert arrows.keys() | {"shaders"} == set(MAY_IMPORT)

    def reached(home: str) -> set[str]:
        return {home}.union(*(reached(below) for below in arrows.get(home, ())))

    imports = homes_graph()
    for home, below in arrows.items():
        assert below <= MAY_IMPORT[home], home
        assert imports[home] <= reached(home), home
