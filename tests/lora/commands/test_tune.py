"""`lora tune`: looks for what is missing, with the time it is given, and says what it chose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import lora.forward.plans.tuning
import lora.shaders.device
from lora.commands.tune import tune_command
from lora.config.schema import load_config
from lora.forward.plans.matmul_plans import ProductShape, Request
from lora.forward.plans.matmul_tiles import Plan, candidates
from lora.forward.plans.tuning import TUNING_SECONDS
from lora.shaders.device import Device
from lora.shaders.errors import InputError
from lora.storage.tile_cache import TileCache, find_tiles
from lora.training.device_state import SessionPlan
from lora.training.workload import Workload
from tests.support.tiny_run import write_run

app = typer.Typer()
app.command()(tune_command)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    if result.exception is not None:
        raise result.exception
    return result.output


def test_a_cpu_device_is_refused(tmp_path: Path, device: Device) -> None:
    if not device.facts.is_cpu:
        pytest.skip("this device is a GPU")
    with pytest.raises(InputError, match="no tiles to choose"):
        run(str(write_run(tmp_path)))


class Card(Device):
    """The software driver, taken for a GPU."""

    def __init__(self, wanted: str | int, webgpu: str = "auto") -> None:
        super().__init__(wanted, webgpu=webgpu)
        info = {**self.facts.info, "adapter_type": "DiscreteGPU"}
        self.facts = replace(self.facts, is_cpu=False, info=info)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, Any]]]:
    """The number of products and the options of every search, none of which times anything."""
    searches = []

    def tuner(
        device: Device, requests: Iterable[Request], **options: Any
    ) -> dict[ProductShape, Plan]:
        found = {r.product: candidates(r.space(device.facts))[-1] for r in requests}
        searches.append((len(found), options))
        return found

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(lora.shaders.device, "Device", Card)
    monkeypatch.setattr(lora.forward.plans.tuning, "tune", tuner)
    monkeypatch.setattr(TileCache.find, "__defaults__", (tuner, TUNING_SECONDS))
    return searches


def test_tune(tmp_path: Path, calls: list[tuple[int, dict[str, Any]]]) -> None:
    config = str(write_run(tmp_path))
    text = run(config, "--seconds", "7")
    # q k v, output, gate up, down, each in both directions, the head's two, and down of the layer
    # that no other layer's norm follows.
    assert calls == [(11, {"seconds": 7.0})]
    assert text.count("q4_1") == 9 and text.count("q8_0") == 2
    assert str(tmp_path / "caches").replace("\n", "") in text.replace("\n", "")
    again = run(config, "--seconds", "7")
    assert again.startswith("All of these were found with as much time before; --again looks")
    assert again.endswith(text) and len(calls) == 1
    assert run(config, "--seconds", "7", "--again") == text and len(calls) == 2
    assert run(config) == text and calls[2] == (11, {"seconds": 30.0})


def test_what_training_found_in_two_seconds_is_looked_for_again(
    tmp_path: Path, calls: list[tuple[int, dict[str, Any]]]
) -> None:
    """Training keeps a plan for every product, those that it had no time for included."""
    config = write_run(tmp_path)
    device = Card("auto")
    workload = Workload.open(load_config(str(config)), train=True)
    requests = SessionPlan.of(device.facts, workload).requests
    find_tiles(device, "auto", requests)
    run(str(config))
    assert calls == [(11, {"seconds": TUNING_SECONDS}), (11, {"seconds": 30.0})]
    find_tiles(device, "auto", requests)
    assert len(calls) == 2
