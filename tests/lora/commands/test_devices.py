"""`lora devices --check`: every kernel against its reference here, and what is written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from lora.checks import suite
from lora.checks.comparison import Check, Comparison
from lora.checks.suite import ALL_CHECKS, run_checks
from lora.commands.cli import app
from lora.shaders import choice
from lora.shaders import device as shaders_device
from lora.shaders.choice import UnavailableError
from lora.shaders.device import Device
from lora.shaders.recording import Recording
from lora.shaders.webgpu import MatrixShape
from tests.support.few_checks import a_few
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


@pytest.mark.parametrize("checks", [a_few(), ALL_CHECKS], ids=["a few", "all"])
def test_every_kernel_has_a_check_and_passes_it(checks: Sequence[Check]) -> None:
    results = list(run_checks(Device, checks))
    assert [(r.check, r.reason) for r in results if r.status == "failed"] == []
    used = {template for result in results for template in result.templates}
    # What only GPUs of some kinds run: its check is there, and compiles nothing on others.
    on_units = {path.stem for path in WGSL.glob("*_matrix*.wgsl")}
    assert used - on_units == {path.stem for path in WGSL.glob("*.wgsl")} - on_units
    kernels = {result.check.kernel for result in results}
    assert {"matmul_matrix", "attention_matrix", "lora_matrix"} <= kernels


def test_what_is_printed_and_written(few: list[Check], tmp_path: Path) -> None:
    status, report, lines = check(tmp_path / "report.json")
    assert status == 0
    assert max(map(len, lines[:-1])) <= 80
    assert report["finished"] and len(report["checks"]) == len(few)
    assert {"device", "description", "backend_type"} <= set(report["device"])
    assert report["limits"]["max-compute-invocations-per-workgroup"] >= 256
    assert {"webgpu-lora", "python", "system"} <= set(report["versions"])
    assert set(report["versions"]) & {"wgpu-native", "Dawn"}
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
    for option in (["--device", "0"], ["--webgpu", "dawn"]):
        done = RUNNER.invoke(app, ["devices", *option])
        assert "belong to --check" in str(done.exception)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--device", "no such card", "no device"),
        ("--webgpu", "metal", "webgpu: got 'metal'"),
        ("--output", "/dev/null/x/y.json", "--output"),
    ],
)
def test_what_is_refused(option: str, value: str, message: str, few: list[Check]) -> None:
    done = RUNNER.invoke(app, ["devices", "--check", option, value])
    assert message in str(done.exception)


CARD = "NVIDIA GeForce RTX 4090 Laptop GPU with a name that no table of ours has room for"


def card(backend: str, maker: str, shapes: tuple[MatrixShape, ...] = ()) -> Any:
    """A device as an implementation lists it."""
    limits = {
        "max-buffer-size": 1 << 40,
        "max-storage-buffer-binding-size": 2**31 - 4,
        "max-compute-workgroup-storage-size": 49152,
        "max-compute-invocations-per-workgroup": 1024,
        "max-storage-buffers-per-shader-stage": 16,
    }
    info = {"device": CARD, "adapter_type": "DiscreteGPU", "backend_type": backend}
    return SimpleNamespace(
        info={**info, "description": "NVIDIA: 580.159.04"},
        features=frozenset({"shader-f16", "subgroups"}),
        limits=limits,
        matrix_shapes=shapes,
        subgroup_lanes=(32, 32) if shapes else None,
        implementation=SimpleNamespace(name=maker, package="p", version="1.2"),
    )


def listed(monkeypatch: pytest.MonkeyPatch, dawn: list[Any] | Exception) -> list[str]:
    """The lines of the command where Dawn lists this."""

    def devices(name: str) -> list[Any]:
        if name == "wgpu":
            return [card("Vulkan", "wgpu-native")]
        if isinstance(dawn, Exception):
            raise dawn
        return dawn

    monkeypatch.setattr(choice, "list_devices", devices)
    monkeypatch.delenv("LORA_WEBGPU")
    done = RUNNER.invoke(app, ["devices"])
    assert done.exit_code == 0
    lines: list[str] = done.output.splitlines()
    assert max(map(len, lines)) <= 80
    return lines


SHAPES = (
    *(MatrixShape(16, n, k, "f16", "f32", 32, 32) for n, k in ((16, 16), (8, 16), (8, 8))),
    MatrixShape(16, 16, 32, "i8", "i32", 32, 32),
)


def test_the_listing_has_both_implementations_in_80_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = " ".join(" ".join(listed(monkeypatch, [card("Vulkan", "Dawn", SHAPES)])).split())
    native, dawn = text.split("Dawn (webgpu: dawn)")
    assert native.startswith("wgpu-native (webgpu: wgpu) 0 NVIDIA GeForce RTX 4090")
    assert "matrix units: none that kernels here can use" in native
    assert "buffer 1 TiB, binding 2 GiB, workgroup 48 KiB and 1024 lanes, 16 buffers" in dawn
    assert "features: shader-f16, subgroups; subgroups of 32" in dawn
    assert "f16→f32 16×16×16, f16→f32 16×8×16, f16→f32 16×8×8 (others: i8→i32 16×16×32)" in dawn
    assert text.endswith(f"webgpu: auto takes {CARD} through Dawn (p 1.2).")


@pytest.mark.parametrize(
    ("dawn", "line"),
    [
        (UnavailableError("Dawn is not installed (pip install it)"), "Dawn is not installed (pip"),
        ([], "no device"),
        ([card("Vulkan", "Dawn", SHAPES[3:])], "none that kernels here can use (others: i8"),
    ],
)
def test_the_listing_says_why_dawn_is_not_taken(
    dawn: list[Any] | Exception, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " ".join(" ".join(listed(monkeypatch, dawn)).split())
    assert line in text and text.endswith("through wgpu-native (p 1.2).")


def test_the_listing_of_this_machine() -> None:
    done = RUNNER.invoke(app, ["devices"])
    assert done.exit_code == 0
    assert "wgpu-native (webgpu: wgpu)\n  0  " in done.output
    assert f"LORA_WEBGPU={os.environ['LORA_WEBGPU']} takes " in done.output
