"""How long a start takes, and what it must not load for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
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


def seconds_of(code: str) -> tuple[float, float]:
    """The CPU's time and the clock's for a process, each the best of five."""
    cpu, clock = [], []
    for _ in range(5):
        before, started = os.times(), time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        clock.append(time.perf_counter() - started)
        after = os.times()
        cpu.append(
            after.children_user + after.children_system
            - before.children_user - before.children_system
        )  # fmt: skip
    return min(cpu), min(clock)


@pytest.mark.parametrize("name", STARTS)
def test_a_start_loads_only_what_it_needs(name: str) -> None:
    code, _, unwanted = STARTS[name]
    shown = subprocess.run([sys.executable, "-c", code + _AFTER], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    loaded = set(json.loads(shown.stdout.splitlines()[-1]))
    assert not loaded & unwanted


@pytest.mark.skipif(os.name == "nt", reason="Windows tells no CPU time of a child")
@pytest.mark.parametrize("name", STARTS)
def test_a_start_is_quick(name: str, record_property: Callable[[str, object], None]) -> None:
    """By the CPU's time, since a busy machine's other processes don't count there; its caches and
    its cores' halves are shared all the same, hence half as much again.
    """
    code, allowed, _ = STARTS[name]
    cpu, clock = seconds_of(code)
    record_property("print", f"{name}: {cpu:.2f} s of CPU time, {clock:.2f} s by the clock, "
                    f"of {allowed} s on a machine with nothing else to do")  # fmt: skip
    assert cpu < 1.5 * allowed
