"""Every module of benchmarks/ opens: most run on a lent GPU only, where minutes are few."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

SCRIPTS = sorted(path.stem for path in (Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_finds_all_that_it_imports(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")
