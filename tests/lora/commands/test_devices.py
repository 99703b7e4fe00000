"""`lora devices --check`: every kernel against its reference here, and what is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lora.checks import suite
from lora.checks.comparison import Check, Comparison
from lora.checks.suite import ALL_CHECKS, run_checks
from lora.commands.cli import app
from lora.shaders import device as shaders_device
from lora.shaders.device import Device
from lora.shaders.recording import Recording
from tests.support.renderings import WGSL

RUNNER = CliRunner()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Check]]:
    """The checks that compile in no time."""
    checks = [c for c in ALL_CHECKS if c.kernel in ("lanes", "gather", "sum_into", "kv_store")]
    monkeypatch.setattr(suite, "ALL_CHECKS", tuple(checks))
    yield checks


def check(output: Path) -> tuple[int, dict[str, Any], list[str]]:
    """Exit status, the file, the lines."""
    done = RUNNER.invoke(app, ["devices", "--check", "--output", str(output)])
    return done.exit_code, json.loads(output.read_text()), done.output.splitlines()


def test_every_kernel_has_a_check_and_passes_it() -> None:
    results = list(run_checks(Device))
    assert [(r.check, r.reason) for r in results if r.status == "failed"] == []
    used = {template for result in results for template in result.templates}
    assert used == {path.stem for path in WGSL.glob("*.wgsl")}


def test_what_is_printed_and_written(few: list[Check], tmp_path: Path) -> None:
    status, report, lines = check(tmp_path / "report.json")
    assert status == 0
    assert max(map(len, lines[:-1])) <= 80
    assert report["finished"] and len(report["checks"]) == len(few)
    assert {"device", "description", "backend_type"} <= set(report["device"])
    assert report["limits"]["max-compute-invocations-per-workgroup"] >= 256
    assert {"webgpu-lora", "wgpu", "python", "system"} <= set(report["versions"])
    row = next(c for c in report["checks"] if c["kernel"] == "sum_into")
    assert row["status"] == "passed" and 0 < row["error"] <= row["bound"]
    assert row["templates"] == ["sum_into"] and row["seconds"] > 0


@pytest.mark.parametrize(
    ("old", "new", "sign"),
    [
        ("+=", "-=", "an error of"),  # another sum
        ("@compute", "@compute nonsense", "GPUError"),  # no WGSL
    ],
)
def test_a_broken_kernel_is_reported_and_the_others_run(
    few: list[Check], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, sign: str
) -> None:
    render = shaders_device.render

    def broken(template: str, constants: dict[str, Any]) -> str:
        text = render(template, constants)
        if template != "sum_into":
            return text
        assert old in text
        return text.replace(old, new)

    monkeypatch.setattr(shaders_device, "render", broken)
    status, report, lines = check(tmp_path / "report.json")
    assert status == 1
    failed = [row for row in report["checks"] if row["status"] == "failed"]
    assert [row["kernel"] for row in failed] == ["sum_into"]
    assert sign in failed[0]["reason"]
    assert any("sum_into" in line and "failed" in line for line in lines)
    assert sum(row["status"] == "passed" for row in report["checks"]) >= len(few) - 4


def test_a_lost_device_is_opened_again() -> None:
    opened: list[Device] = []

    def open_device() -> Device:
        opened.append(Device())
        return opened[-1]

    def lose(recording: Recording) -> Comparison:
        recording.memory.handle.close()
        raise RuntimeError("device lost")

    gather = next(c for c in ALL_CHECKS if c.kernel == "gather")
    results = list(run_checks(open_device, [Check("lost", "", lose), gather, gather]))
    assert [r.status for r in results] == ["failed", "passed", "passed"]
    assert "device lost" in results[0].reason and len(opened) == 2


def test_a_machine_that_opens_no_device_any_more() -> None:
    """Every check that is left says so."""

    def refuse() -> Device:
        raise RuntimeError("no device")

    results = list(run_checks(refuse, ALL_CHECKS[:3]))
    assert [r.reason for r in results] == ["RuntimeError: no device"] * 3


def test_options_of_the_check_alone_are_refused() -> None:
    done = RUNNER.invoke(app, ["devices", "--device", "0"])
    assert "belong to --check" in str(done.exception)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--device", "no such card", "no device"), ("--output", "/dev/null/x/y.json", "--output")],
)
def test_what_is_refused(option: str, value: str, message: str, few: list[Check]) -> None:
    done = RUNNER.invoke(app, ["devices", "--check", option, value])
    assert message in str(done.exception)


def test_the_listing_is_as_before() -> None:
    done = RUNNER.invoke(app, ["devices"])
    assert done.exit_code == 0 and "backend" in done.output
