"""The direction of imports between rooms and between their wings, without a circle anywhere."""

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.support.imports import (
    MAY_IMPORT,
    REPOSITORY,
    ROOMS,
    circle,
    home_of,
    homes_graph,
    import_graph,
    imported_names,
    module_files,
)

JUDGES = {"torch", "transformers", "peft", "xllamacpp", "accelerate", "trl", "tests", "benchmarks"}


def test_every_home_has_its_directions() -> None:
    assert {home_of(module) for module in module_files()} == set(MAY_IMPORT)


@pytest.mark.parametrize("home", MAY_IMPORT)
def test_imports_go_downwards(home: str) -> None:
    assert homes_graph()[home] <= MAY_IMPORT[home]


@pytest.mark.parametrize("graph", [import_graph, homes_graph])
def test_there_is_no_circle(graph: object) -> None:
    assert callable(graph)
    assert circle(graph()) == []


def test_a_circle_is_found() -> None:
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}


def test_nothing_imports_a_judge_or_a_room_by_its_bare_name() -> None:
    for module, path in module_files().items():
        first = {name.split(".")[0] for name in imported_names(path)}
        assert not first & (JUDGES | (set(ROOMS) - {"lora"})), module


@pytest.mark.parametrize(
    ("package", "files"),
    [
        ("wgpu", {"shaders/native.py"}),
        # The second asks Dawn's compiler in a process of its own.
        ("wgpudawn", {"shaders/dawn.py", "tests/support/tint.py"}),
    ],
)
def test_one_file_knows_an_implementation_of_webgpu(package: str, files: set[str]) -> None:
    """All others go through shaders/webgpu.py."""
    every = [*module_files().values(), *(REPOSITORY / "benchmarks").rglob("*.py")]
    every += [path for path in (REPOSITORY / "tests").rglob("*.py")]
    knowing = {
        str(path.relative_to(REPOSITORY))
        for path in every
        if any(name.split(".")[0] == package for name in imported_names(path))
    }
    assert knowing == files


def test_tests_and_benchmarks_share_through_support_alone() -> None:
    """Nothing imports a test; of benchmarks only their own tests know."""
    for folder in ("tests", "benchmarks"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            own = path.relative_to(REPOSITORY)
            names = {name for name in imported_names(path) if "." in name}
            tests = {name for name in names if name.startswith("tests.")}
            assert all(name.startswith("tests.support") for name in tests), own
            if folder == "tests" and own.parts[1] != "benchmarks":
                assert not any(name.startswith("benchmarks.") for name in names), own


@cache
def at_top(path: Path) -> set[str]:
    """What importing a file of tests imports, files of tests/support followed."""
    body = [node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.If)]
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    for name in sorted(names):
        support = REPOSITORY / f"{name.replace('.', '/')}.py"
        if name.startswith("tests.support.") and support.exists():
            names |= at_top(support)
    return names


def test_tests_are_collected_without_the_judges() -> None:
    """`make test` has none of them, and collects those of tests/parity that need none."""
    judges = JUDGES - {"tests", "benchmarks"}
    for path in sorted((REPOSITORY / "tests").rglob("test_*.py")):
        assert not judges & {name.split(".")[0] for name in at_top(path)}, path


def test_make_parity_looks_where_the_judges_tests_are() -> None:
    """Elsewhere there are some for `make parity-long`, which collects all."""
    makefile = (REPOSITORY / "Makefile").read_text()
    folders = makefile.partition("JUDGED := ")[2].splitlines()[0].split()
    for path in sorted((REPOSITORY / "tests").rglob("test_*.py")):
        own, text = path.relative_to(REPOSITORY), path.read_text()
        if (
            not any(own.is_relative_to(folder) for folder in folders)
            and own.name != "test_rooms.py"
        ):
            assert text.count("mark.parity") == text.count("mark.parity, pytest.mark.long"), own


@pytest.mark.parametrize("room", ["forward", "backward", "optim", "shaders"])
def test_functions_take_eight_arguments_at_most(room: str) -> None:
    """Products and attention grew twice by one flag more; what goes together is a value."""
    long = []
    for path in sorted((REPOSITORY / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if len([a for a in arguments if a.arg not in ("self", "cls")]) > 8:
                    long.append(f"{path.relative_to(REPOSITORY)}: {node.name}")
    assert not long
