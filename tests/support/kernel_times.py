"""A pytest plugin that shows what kernels cost.

    python -m pytest -p tests.support.kernel_times FILE

A driver translates a kernel when its pipeline is made, but Mesa's llvmpipe compiles it when it is
first run, so that the runs, writes and reads after it wait. What they take until the next read is
over is divided among the pipelines made before. An empty MESA_SHADER_CACHE_DIR shows what a
new machine pays.
"""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pytest

from lora.shaders.device import Device
from lora.shaders.memory import Arena
from lora.shaders.program import Program


@dataclass
class FileCost:
    """What one test file took."""

    processor: float = 0.0  # seconds of all threads and of ended children
    pipelines: int = 0
    renderings: int = 0  # of these, which no file before it had
    waited: float = 0.0  # seconds in making pipelines, and in first runs


_costs: dict[str, FileCost] = defaultdict(FileCost)
_seconds: dict[tuple[str, str], float] = {}  # of each (template, constants)
_fresh: list[tuple[str, str]] = []  # made, and nothing was read since
_file = ""
_make_pipeline = Device.pipeline


def _timed_pipeline(self: Device, template: str, constants: dict[str, Any]) -> Any:
    before = len(self._pipelines)
    start = time.perf_counter()
    pipeline = _make_pipeline(self, template, constants)
    seconds = time.perf_counter() - start
    if len(self._pipelines) > before:
        cost, key = _costs[_file], (template, repr(sorted(constants.items())))
        cost.pipelines += 1
        cost.waited += seconds
        if key not in _seconds:
            cost.renderings += 1
            _fresh.append(key)
        _seconds[key] = _seconds.get(key, 0.0) + seconds
    return pipeline


def _timed(method: Any, *, ends: bool) -> Any:
    """The method, timed where pipelines are fresh; `ends`: they are no longer, afterwards."""

    def timed(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = method(*args, **options)
        if _fresh:
            seconds = time.perf_counter() - start
            _costs[_file].waited += seconds
            for key in _fresh:
                _seconds[key] += seconds / len(_fresh)
            if ends:
                _fresh.clear()
        return result

    return timed


def _processor_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def pytest_configure(config: pytest.Config) -> None:
    Device.pipeline = _timed_pipeline  # type: ignore[method-assign]
    Arena.read = _timed(Arena.read, ends=True)  # type: ignore[method-assign]
    Arena.write = _timed(Arena.write, ends=False)  # type: ignore[method-assign]
    Program.run = _timed(Program.run, ends=False)  # type: ignore[method-assign]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    global _file
    _file = item.nodeid.split("::")[0]
    before = _processor_seconds()
    try:
        return (yield)
    finally:
        _costs[_file].processor += _processor_seconds() - before


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("what kernels cost")
    terminalreporter.line("processor s  pipelines  new renderings  waited s  file")
    for file, cost in sorted(_costs.items(), key=lambda entry: -entry[1].processor):
        terminalreporter.line(
            f"{cost.processor:11.1f}{cost.pipelines:11}{cost.renderings:16}"
            f"{cost.waited:10.1f}  {file}"
        )
    terminalreporter.line("renderings, by seconds:")
    for (template, constants), seconds in sorted(_seconds.items(), key=lambda e: -e[1])[:20]:
        terminalreporter.line(f"{seconds:8.2f}  {template} {constants}")
