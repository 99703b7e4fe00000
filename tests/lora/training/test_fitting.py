"""The largest sizes within a memory limit: one more does not fit, and what is said does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from lora.commands.cli import app
from lora.config.schema import load_config
from lora.data.examples import Example
from lora.shaders.device import Device
from lora.shaders.errors import InputError
from lora.training import fitting
from lora.training.device_state import SessionPlan
from lora.training.fitting import _largest, fits
from lora.training.workload import Workload
from tests.support.tiny_run import write_run


def taken(device: Device, path: Path, length: int, batch_size: int, recompute: str) -> int:
    """Bytes of a session on that many examples of that length."""
    sizes = [f"data.max_length={length}", f"train.batch_size={batch_size}"]
    overrides = [*sizes, f"train.recompute={recompute}"]
    example = Example(np.zeros(length, np.int32), np.arange(length) > 0, 0)
    examples = [example] * batch_size
    workload = Workload.open(load_config(str(path), overrides), train=True, examples=examples)
    return sum(SessionPlan.of(device.facts, replace(workload, eval_examples=[])).allocated.values())


def test_what_fits_fits_and_more_does_not(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "_LENGTH_STEP", 8)
    path = write_run(tmp_path)
    limit = taken(device, path, 100, 2, "on")
    override = [f"train.memory_limit='{limit}'", "data.max_length=50", "train.batch_size=2"]
    found = fits(device.facts, Workload.open(load_config(str(path), override), train=True))
    assert found.limit == limit and found.recomputed is not None
    assert found.on.length == 96  # of 100, in steps of 8
    for fit, recompute in ((found.off, "off"), (found.on, "on")):
        assert fit.batch_size is not None
        assert taken(device, path, 50, fit.batch_size, recompute) <= limit
        assert taken(device, path, 50, fit.batch_size + 1, recompute) > limit
    assert (found.off.batch_size or 0) < (found.on.batch_size or 0)
    assert (found.off.length or 0) < found.on.length


def test_nothing_fits(tmp_path: Path, device: Device) -> None:
    config = load_config(str(write_run(tmp_path)), ["train.memory_limit=1KiB"])
    found = fits(device.facts, Workload.open(config, train=True))
    assert (found.recomputed, found.on.length, found.off.batch_size) == (None, None, None)


def test_nothing_tells_the_memory(tmp_path: Path, device: Device) -> None:
    facts = replace(device.facts, is_cpu=False, device_memory=None, name="A card")
    workload = Workload.open(load_config(str(write_run(tmp_path))), train=True)
    with pytest.raises(InputError, match="nothing tells how much memory A card has; give a size"):
        fits(facts, workload)


@pytest.mark.parametrize(
    ("limit", "most"), [(0, 9), (1, 9), (5, 9), (9, 9), (40, 9), (8, 8), (3, 1)]
)
def test_the_largest_number(limit: int, most: int) -> None:
    found = _largest(lambda n: n <= limit, most)
    assert found == (min(limit, most) or None)


def test_the_command_line(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    done = CliRunner().invoke(app, ["plan", str(path), "--fit", "--set", "train.memory_limit=4MiB"])
    assert done.exit_code == 0, done.output
    assert "Within 0.00 GiB (train.memory_limit) this config fits with" in done.output
    assert "tokens at batch_size" in done.output
