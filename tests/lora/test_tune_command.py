"""`lora tune`: looks for what is missing, with the time it is given, and says what it chose."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import lora.tune_command
import shaders.device
from forward.matmul_tiles import Plan, candidates
from forward.tuning import Product, Request
from lora.tune_command import tune_command
from shaders.device import Device
from shaders.errors import InputError
from tests.lora.tiny_run import write_run

app = typer.Typer()
app.command()(tune_command)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    if result.exception is not None:
        raise result.exception
    return result.output


def test_an_adapter_on_the_cpu_is_refused(tmp_path: Path, device: Device) -> None:
    if not device.is_cpu:
        pytest.skip("this adapter is a GPU")
    with pytest.raises(InputError, match="no tiles to choose"):
        run(str(write_run(tmp_path)))


def test_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = str(write_run(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))

    class Card(Device):
        """The software adapter, taken for a GPU."""

        def __init__(self, wanted: str | int) -> None:
            super().__init__(wanted)
            self.is_cpu, self.info["adapter_type"] = False, "DiscreteGPU"

    calls = []

    def tuner(device: Device, requests: Iterable[Request], **options: Any) -> dict[Product, Plan]:
        found = {r.product: candidates(*r.shape(device))[-1] for r in requests}
        calls.append((len(found), options))
        return found

    monkeypatch.setattr(shaders.device, "Device", Card)
    monkeypatch.setattr(lora.tune_command, "tune", tuner)
    text = run(config, "--seconds", "7")
    # q k v, output, gate up, down, each in both directions, and the head's two.
    assert calls == [(10, {"seconds": 7.0})]
    assert text.count("q4_1") == 8 and text.count("q8_0") == 2
    assert str(tmp_path / "caches").replace("\n", "") in text.replace("\n", "")
    again = run(config)
    assert again.startswith("All of these were found before; --again looks for them anew.")
    assert again.endswith(text) and len(calls) == 1
    assert run(config, "--again") == text and len(calls) == 2
