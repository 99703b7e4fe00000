"""A pytest plugin that shows which lines of `lora` the tests run; `make test` has it.

    python -m pytest -p tests.support.covered_lines FILE

SlipCover puts a probe before each line when a module is imported, and takes away those that have
fired (Python 3.12 does it by `sys.monitoring`), so that lines which run often cost no more than
others. Workers of xdist send what they saw to the controller. Child processes are not followed.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

try:
    import slipcover
except ImportError:  # no wheel for Python 3.11 on ARM's Linux: pyproject.toml leaves it out there
    slipcover = None

_PACKAGE = Path(__file__).parent.parent.parent / "lora"
# The rooms are links in `lora`, through which they are imported; SlipCover compares resolved paths.
_SOURCES = [_PACKAGE, *(entry for entry in _PACKAGE.iterdir() if entry.is_symlink())]
# Probes that have fired so often are looked for in all modules, with all others that have fired:
# with SlipCover's own 50 that was done six times as often, and took four times as long.
_FIRED_TO_GO = 1_000


class CoveredLines:
    """What this process, and the workers that it started, have seen."""

    def __init__(self, *, is_worker: bool, has_workers: bool) -> None:
        # Files that nothing imported count as well; to find them is the controller's work.
        self._lines = slipcover.Slipcover(
            source=None if is_worker else [str(_PACKAGE)],
            omit=[str(_PACKAGE / "configs" / "*")],  # what wrote the recorded commands
            d_miss_threshold=_FIRED_TO_GO,
        )
        self._by_workers: list[str] = []
        if not has_workers:
            matcher = slipcover.FileMatcher(sources=_SOURCES)
            slipcover.ImportManager(self._lines, matcher).__enter__()

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["covered_lines"] = json.dumps(self._lines.get_coverage())

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker that crashed gives nothing."""
        if "covered_lines" in getattr(node, "workeroutput", {}):
            self._by_workers.append(node.workeroutput["covered_lines"])

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        coverage = self._lines.get_coverage()
        for seen in self._by_workers:
            slipcover.merge_coverage(coverage, json.loads(seen))
        table = io.StringIO()
        slipcover.print_coverage(coverage, outfile=table, skip_covered=True)
        terminalreporter.section("lines that no test ran")
        terminalreporter.write_line(table.getvalue())
        covered = coverage["summary"]["percent_covered"]
        terminalreporter.write_line(f"{covered:.1f}% of lora's lines were run")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before tests/conftest.py imports `lora`."""
    if slipcover is None:
        return
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    processes = getattr(early_config.known_args_namespace, "numprocesses", None)
    plugin = CoveredLines(is_worker=is_worker, has_workers=bool(processes) and not is_worker)
    early_config.pluginmanager.register(plugin)


def pytest_report_header() -> str | None:
    return None if slipcover else "lines are not counted: SlipCover is not installed"
