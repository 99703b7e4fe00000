"""How long a start takes, and what it must not load for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

_AFTER = "import json, sys; print(json.dumps(sorted(sys.modules)))"
# As the installed command is run: argv, then lora.__main__.main, which may exit.
_COMMAND = """
import sys
sys.argv = ["lora"{}]
from lora.__main__ import main
try:
    main()
except SystemExit:
    pass
"""
_TAB = """
import os
os.environ |= {"_LORA_COMPLETE": "complete_bash", "COMP_WORDS": "lora ", "COMP_CWORD": "1"}
"""

_NEVER = {"datasets", "huggingface_hub", "torch", "transformers"}  # for a start of any kind
_HEAVY = _NEVER | {"numpy", "wgpu", "gguf", "pydantic", "jinja2", "yaml", "tokenizers"}

# name: (code, seconds, modules that stay unloaded)
STARTS = {
    "import lora": ("import lora\n", 0.3, _HEAVY | {"typer", "rich", "lora.commands"}),
    "lora --version": (
        _COMMAND.format(", '--version'"), 0.3, _HEAVY | {"typer", "rich", "lora.commands"}
    ),
    "lora, completed by a shell": (
        _TAB + _COMMAND.format(""), 0.8, _HEAVY - {"pydantic"}  # typer's own
    ),
    "from lora import TrainingSession": (
        "from lora import TrainingSession\n",
        0.8,
        _NEVER | {"pydantic", "jinja2", "typer", "rich", "wgpu"},
    ),
}  # fmt: skip


# Modules of Python alone, for how fast the machine is now: what else it does slows a start just so,
# in processor seconds, too, as cores share caches and halves of cores each other's units.
_PYTHONS_OWN = (
    "import asyncio, concurrent.futures, ctypes.util, doctest, email.mime.text, http.server, "
    "logging.config, multiprocessing.pool, pydoc, sqlite3, tarfile, unittest.mock, urllib.request, "
    "xml.dom.minidom, xmlrpc.client, zipfile\n"
)
_PYTHONS_OWN_SECONDS = 0.15


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which Python keeps what it compiled, as for whoever installs the package.

    CI's may say otherwise, and to compile 300 modules takes longer than what is measured.
    """
    prefix = tmp_path_factory.mktemp("compiled")
    return os.environ | {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(prefix)}


def seconds_of(codes: tuple[str, ...], allowed: float, environment: dict[str, str]) -> list[float]:
    """The CPU's seconds for a process of each, the best of five taken in turn.

    No more are taken once the first is `allowed`: more could only lower it.
    """
    seconds: list[list[float]] = [[] for _ in codes]
    for _ in range(5):
        if seconds[0] and min(seconds[0]) < allowed:
            break
        for code, taken in zip(codes, seconds, strict=True):
            before = os.times()
            command = [sys.executable, "-c", code]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
            after = os.times()
            taken.append(
                after.children_user + after.children_system
                - before.children_user - before.children_system
            )  # fmt: skip
    return [min(taken) for taken in seconds]


@pytest.mark.parametrize("name", STARTS)
def test_a_start_loads_only_what_it_needs(name: str) -> None:
    code, _, unwanted = STARTS[name]
    shown = subprocess.run([sys.executable, "-c", code + _AFTER], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    loaded = set(json.loads(shown.stdout.splitlines()[-1]))
    assert not loaded & unwanted


@pytest.mark.skipif(os.name == "nt", reason="Windows tells no CPU time of a child")
@pytest.mark.parametrize("name", STARTS)
def test_a_start_is_quick(
    name: str, compiled: dict[str, str], record_property: Callable[[str, object], None]
) -> None:
    """By the CPU's time, and by what Python's own modules take meanwhile."""
    code, allowed, _ = STARTS[name]
    for _ in range(3):  # what else begins or ends may slow the one and not the other
        cpu, own = seconds_of((code, _PYTHONS_OWN), allowed, compiled)
        slower = max(1.0, own / _PYTHONS_OWN_SECONDS)
        if cpu < allowed * slower:
            break
    record_property(
        "print",
        f"{name}: {cpu:.2f} s of CPU time, of {allowed} s where Python's own modules take "
        f"{_PYTHONS_OWN_SECONDS} s; they took {own:.2f} s",
    )
    assert cpu < allowed * slower
