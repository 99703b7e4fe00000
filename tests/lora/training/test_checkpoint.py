"""What a checkpoint keeps of how sums were taken, and what resuming does with it."""

from __future__ import annotations

import json
import shutil
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora.config.schema import load_config
from lora.forward.plans.matmul_plans import ProductShape, Request
from lora.forward.plans.matmul_tiles import Plan, cut
from lora.shaders.device import Device
from lora.shaders.errors import InputError
from lora.shaders.templates import render
from lora.storage.tile_cache import TileCache, Tuner
from lora.training import checkpoint
from lora.training.checkpoint import checkpoints, device_of_then
from lora.training.resuming import resume
from lora.training.run import run_training
from lora.training.session import TrainingSession
from tests.support.half_tensors import needs_halves
from tests.support.plans import gpu as gpu  # a fixture
from tests.support.plans import use_tuner
from tests.support.tiny_run import write_run

ADAPTER = "adapter_model.safetensors"


def in_stretches(count: int) -> Tuner:
    """A tuner that finds one tile best, and contractions cut into so many stretches.

    All tests here take one or two: of each product a driver compiles as many kernels.
    """

    def tuner(
        device: Device, requests: Sequence[Request], *, seconds: float
    ) -> dict[ProductShape, Plan]:
        plans = {}
        for request in requests:
            tile = request.tiles[0]
            cuts = cut(request.constants["contraction"], count, tile.depth)
            plans[request.product] = Plan(tile, *cuts)
        return plans

    return tuner


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a run with a checkpoint every two steps; it begins with what no model of tiles takes."""
    use_tuner(monkeypatch, in_stretches(2))
    return write_run(tmp_path, train={"save_every": 2, "eval_every": 4, "keep_checkpoints": 9})


def open_session(config: Path, device: Device, *overrides: str) -> TrainingSession:
    return TrainingSession(load_config(str(config), overrides), device=device)


def stopped_after(output: Path, step: int) -> None:
    """Leaves a run as if it had been killed after the checkpoint of a step."""
    for path in checkpoints(output):
        if int(path.name[-6:]) > step:
            shutil.rmtree(path)
    (output / ADAPTER).unlink()


@pytest.mark.parametrize("tuning", ["auto", "off"])
def test_resumed_with_the_plans_of_then(
    config: Path, gpu: Device, tuning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, though the file of plans was deleted and others were found since."""
    session = open_session(config, gpu)
    output = run_training(session)
    whole = (output / ADAPTER).read_bytes()
    stopped_after(output, 4)

    TileCache(gpu).forget()
    use_tuner(monkeypatch, in_stretches(1))  # as the model has it, which is asked without tuning
    setting = f"train.tuning={tuning}"
    other = open_session(config, gpu, setting, f"output={tmp_path / 'other'}")
    assert other.plans != session.plans
    run_training(other)
    assert (tmp_path / "other" / ADAPTER).read_bytes() != whole

    gpu.allocated.clear()
    resumed = open_session(config, gpu, setting)
    assert resumed.plans == other.plans
    recorded, taken = weakref.ref(resumed._programs), dict(gpu.allocated)
    run_training(resumed, resuming=True)
    assert (output / ADAPTER).read_bytes() == whole
    assert resumed.plans == session.plans
    assert recorded() is None and gpu.allocated["scratch"] >= taken.pop("scratch", 0)
    assert {name: gpu.allocated[name] for name in taken} == taken
    # What it saves is what it used: the next to resume goes on as well.
    stopped_after(output, 6)
    assert run_training(open_session(config, gpu, setting), resuming=True) == output
    assert (output / ADAPTER).read_bytes() == whole


def test_another_driver_is_said(config: Path, gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans were found for the other one, and its compiler may order sums as it likes."""
    run_training(open_session(config, gpu))
    info = {**gpu.facts.info, "description": "driver 2.0"}
    monkeypatch.setattr(gpu, "facts", replace(gpu.facts, info=info))
    use_tuner(monkeypatch, in_stretches(1))
    session = open_session(config, gpu)
    own = dict(session.plans)
    with pytest.warns(UserWarning, match=r"made with driver driver 1\.0 \(now driver 2\.0\): the"):
        resume(session, Path(session.config.output))
    assert session.plans == own


def test_products_that_the_checkpoint_does_not_know_are_said(
    config: Path, gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as those of longer micro-batches, after other data for evaluation."""
    session = open_session(config, gpu)
    path = checkpoints(run_training(session))[-1] / "state.json"
    state, then = json.loads(path.read_text()), dict(session.plans)
    unknown = next(iter(then))
    del state["plans"][unknown.key]
    path.write_text(json.dumps(state))
    TileCache(gpu).forget()
    use_tuner(monkeypatch, in_stretches(1))
    session = open_session(config, gpu)
    own = session.plans[unknown]
    assert own != then[unknown]
    with pytest.warns(UserWarning, match=f"no tiles for 1 of {len(then)} products: the last bits"):
        resume(session, Path(session.config.output))
    assert session.plans == then | {unknown: own}


def test_other_kernels_are_said(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that no plan is about: here the norms', on a device without plans."""
    config = write_run(tmp_path, train={"steps": 2, "save_every": 2})
    run_training(open_session(config, device))

    def other(template: str, constants: dict[str, Any]) -> str:
        return render(template, constants) + ("// changed\n" if template == "rmsnorm" else "")

    session = open_session(config, device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resume(session, Path(session.config.output))
    monkeypatch.setattr("lora.shaders.program.render", other)
    session = open_session(config, device)
    with pytest.warns(UserWarning, match="made with other kernels: the last bits"):
        resume(session, Path(session.config.output))


def test_another_precision_is_refused(tmp_path: Path, device: Device) -> None:
    needs_halves(device.facts)
    config = write_run(tmp_path, train={"save_every": 4})
    run_training(open_session(config, device))
    with pytest.raises(InputError, match=r"made with train\.precision f32, and now it is f16"):
        run_training(open_session(config, device, "train.precision=f16"), resuming=True)


def test_another_implementation_is_said(
    config: Path, gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own name: Dawn's version is none of wgpu's."""
    native = replace(gpu.facts, implementation="wgpu-native", version="0.32.0")
    dawn = replace(native, implementation="Dawn", version="0.32.0.4")
    for then, now, said in (
        (native, dawn, r"made with wgpu 0\.32\.0 \(now Dawn 0\.32\.0\.4\): the last bits"),
        (dawn, native, r"made with Dawn 0\.32\.0\.4 \(now 0\.32\.0\): the last bits"),
    ):
        monkeypatch.setattr(gpu, "facts", then)
        run_training(open_session(config, gpu))
        monkeypatch.setattr(gpu, "facts", now)
        session = open_session(config, gpu)
        with pytest.warns(UserWarning, match=said):
            resume(session, Path(session.config.output))


@pytest.mark.parametrize(
    ("asked", "environment", "then", "opened"),
    [
        ("auto", None, "dawn", ["dawn"]),  # what the checkpoint names
        ("auto", None, "wgpu", ["wgpu"]),
        ("auto", None, "vulkan", ["auto"]),  # nothing that we know
        ("auto", None, None, ["auto"]),  # of a version that did not keep it
        ("auto", "wgpu", "dawn", ["auto"]),  # asked for otherwise: `resume` says so
        ("wgpu", None, "dawn", ["wgpu"]),
        ("auto", None, "gone", ["dawn", "auto"]),  # it can't be used any more
    ],
)
def test_a_resumed_run_takes_the_implementation_of_then(
    asked: str,
    environment: str | None,
    then: str | None,
    opened: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "run" / "checkpoints" / "step-000002"
    path.mkdir(parents=True)
    state = {"step": 2, "precision": "f32", "stream": {}, "found_with": {}, "plans": {}}
    if then is not None:
        state["webgpu"] = "dawn" if then == "gone" else then
    (path / "state.json").write_text(json.dumps(state))
    loaded = load_config(str(write_run(tmp_path)), [f"webgpu={asked}"])
    monkeypatch.delenv("LORA_WEBGPU")
    if environment is not None:
        monkeypatch.setenv("LORA_WEBGPU", environment)
    asked_with: list[str] = []

    def open_device(wanted: str, *, webgpu: str) -> str:
        asked_with.append(webgpu)
        if then == "gone" and webgpu == "dawn":
            raise InputError("webgpu: dawn: Dawn is not installed")
        return webgpu

    monkeypatch.setattr(checkpoint, "Device", open_device)
    assert device_of_then(loaded) == opened[-1]
    assert asked_with == opened


def test_what_a_checkpoint_keeps_of_the_implementation(tmp_path: Path, device: Device) -> None:
    config = write_run(tmp_path, train={"steps": 2, "save_every": 2})
    path = checkpoints(run_training(open_session(config, device)))[-1]
    state = json.loads((path / "state.json").read_text())
    assert state["webgpu"] == device.found.implementation.setting
    (path / "state.json").write_text("{")  # `resume` says what is wrong with it
    with device_of_then(load_config(str(config))) as opened:
        assert opened.facts.software == device.facts.software
