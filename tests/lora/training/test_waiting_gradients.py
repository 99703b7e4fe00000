"""Gradients of A and B that wait for the next group read what they would have read at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.forward.rmsnorm import MOST_LOW_BYTES
from lora.shaders.device import Device
from lora.shaders.program import Dispatch
from lora.training.communicator import SingleProcess
from lora.training.device_state import Seams
from tests.support.places import Places, written
from tests.support.renderings import LARGE_GPU, MATRIX_GPU, Kind
from tests.support.tiny_models import TINY_MODELS
from tests.support.tiny_ours import gradients, open_session
from tests.support.tiny_sessions import micro_batch

_ALL = {"layers": "all", "targets": "all-linear"}
_WITHOUT_PRE_NORMS = ("olmo2", "olmo3", "exaone4")
_MERGED = ("lora_backward", "lora_backward_matrix")
_GRADIENTS = ("lora_gradient", "lora_gradient_matrix", *_MERGED)


class _TwoProcesses(SingleProcess):
    """As far as recording asks."""

    size = 2


def what_gradients_read(dispatches: Sequence[Dispatch]) -> list[list[str]]:
    """For each group's gradients, in order, what wrote its x, z, d_y and d_z."""
    last: dict[int, str] = {}
    found = []
    for dispatch in dispatches:
        if dispatch.template in _GRADIENTS:
            found.append([last.get(id(t.buffer), "") for t in dispatch.tensors[1:5]])
        # d_z may come out of either.
        name = dispatch.label.replace("lora_project_gradient", "lora_backward")
        for binding in written(dispatch):
            last[id(dispatch.tensors[binding].buffer)] = name
    return found


@pytest.fixture(autouse=True)
def _places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora.training.device_state.CountingMemory", Places)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_they_read_the_same(name: str, tmp_path: Path) -> None:
    """Whatever blocks a family has: no kernel between may write over what waits."""
    model = TINY_MODELS[name]
    model.write_gguf(tmp_path / "model.gguf")
    own = {"layers": model.layers or "all", "targets": model.targets}
    cases: list[tuple[Kind, dict[str, Any], dict[str, Any]]] = [
        (MATRIX_GPU, own, {"precision": "f16", "recompute": "off"}),
        (LARGE_GPU, _ALL, {"precision": "f32", "recompute": "on"}),
    ]
    for kind, adapter, train in cases:
        few = replace(kind, most_storage_buffers=8)
        apart, waiting = (
            micro_batch(tmp_path / "model.gguf", k, adapter, **train) for k in (few, kind)
        )
        assert not any(dispatch.template in _MERGED for dispatch in apart)
        assert what_gradients_read(waiting) == what_gradients_read(apart)
        n_merged = sum(dispatch.template in _MERGED for dispatch in waiting)
        assert len(waiting) == len(apart) - n_merged
        assert n_merged > 0 or len(what_gradients_read(apart)) < 2


@pytest.mark.parametrize(
    "adapter",
    [
        {"targets": ["q_proj", "down_proj"]},
        {"targets": ["o_proj", "up_proj"]},
        {"targets": "all-linear", "layers": [1]},
        {"targets": "all-linear", "variant": "dora"},
        {"targets": "all-linear", "dropout": 0.1},
    ],
    ids=str,
)
def test_they_read_the_same_where_not_all_is_adapted(
    adapter: dict[str, Any], tmp_path: Path
) -> None:
    TINY_MODELS["gemma2"].write_gguf(tmp_path / "model.gguf")
    few = replace(LARGE_GPU, most_storage_buffers=8)
    for recompute in ("on", "off"):
        apart, waiting = (
            micro_batch(tmp_path / "model.gguf", kind, adapter, recompute=recompute)
            for kind in (few, LARGE_GPU)
        )
        assert what_gradients_read(waiting) == what_gradients_read(apart)
        merged = sum(dispatch.template in _MERGED for dispatch in waiting)
        if recompute == "off":  # else what is below is run again in between
            assert (merged > 0) == (adapter.get("variant") != "dora")


def test_dropout_is_no_dispatch_more_on_matrix_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora.forward.rmsnorm.MOST_LOW_BYTES", 0)  # z by dispatches of its own
    TINY_MODELS["llama"].write_gguf(tmp_path / "model.gguf")
    without, dropped = (
        micro_batch(tmp_path / "model.gguf", MATRIX_GPU, _ALL | adapter, precision="f16")
        for adapter in ({}, {"dropout": 0.1})
    )

    def kinds(dispatches: Sequence[Dispatch]) -> list[str]:
        """But for the tiles of products, which plans choose."""
        return [d.template for d in dispatches if not d.template.startswith("matmul")]

    assert kinds(dropped) == kinds(without)
    assert {"lora_project_matrix", "lora_backward_matrix"} <= {*kinds(dropped)}


def test_none_waits_past_its_layer_where_processes_add_gradients_up(tmp_path: Path) -> None:
    """What is sent to the others is a layer's gradients as soon as they are whole."""
    TINY_MODELS["llama"].write_gguf(tmp_path / "model.gguf")
    seams = Seams(communicator=_TwoProcesses())
    for of, last in ((None, "lora_backward"), (seams, "lora_gradients")):
        found = micro_batch(tmp_path / "model.gguf", LARGE_GPU, _ALL, of, recompute="off")
        labels = [d.label for d in found if d.label.startswith("backward.layers.1.lora_")]
        assert labels[-1] == f"backward.layers.1.{last}"


def test_the_same_gradients(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole step as a GPU records it: to the last bit."""
    model = TINY_MODELS["llama_bias"]
    model.write_gguf(tmp_path / "model.gguf")
    model.write_adapter(tmp_path / "adapter")
    found = []
    most = device.facts.most_storage_buffers
    for buffers, low_bytes in ((8, MOST_LOW_BYTES), (most, MOST_LOW_BYTES), (most, 0)):
        monkeypatch.setattr("lora.forward.rmsnorm.MOST_LOW_BYTES", low_bytes)

        def opened(wanted: Any, webgpu: str = "auto", buffers: int = buffers) -> Device:
            one = Device(wanted, webgpu=webgpu)
            one.facts = replace(one.facts, is_cpu=False, most_storage_buffers=buffers)
            return one

        monkeypatch.setattr("lora.training.session.Device", opened)
        session = open_session(
            model, tmp_path / "model.gguf", tmp_path / "adapter", recompute="off", precision="f32"
        )
        templates = {d.template for program in session.step_programs() for d in program.dispatches}
        assert ("lora_backward" in templates) == (buffers > 8)
        found.append(gradients(session))
    apart, waiting, z_apart = found
    assert waiting.loss == apart.loss == pytest.approx(z_apart.loss, rel=1e-6)
    for path, gradient in apart.gradients.items():
        assert np.abs(gradient).max() > 0
        assert waiting.gradients[path].tobytes() == gradient.tobytes(), path
        # Norms sum z in another order: f32 rounding, as in test_default_limits.py.
        bound = 2e-5 * np.abs(gradient).max()
        np.testing.assert_allclose(z_apart.gradients[path], gradient, rtol=0, atol=bound)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_what_writes_z(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that writes z gives the product its x, too, and takes the A of a projection."""
    model = TINY_MODELS[name]
    model.write_gguf(tmp_path / "model.gguf")
    own = {"layers": model.layers or "all", "targets": model.targets}
    cases: list[tuple[Kind, dict[str, Any], dict[str, Any]]] = [
        (MATRIX_GPU, own, {"precision": "f16", "recompute": "off"}),
        (LARGE_GPU, _ALL, {"precision": "f32", "recompute": "on"}),
    ]
    for kind, adapter, train in cases:
        found = {}
        for low_bytes in (MOST_LOW_BYTES, 0):
            monkeypatch.setattr("lora.forward.rmsnorm.MOST_LOW_BYTES", low_bytes)
            dispatches = micro_batch(tmp_path / "model.gguf", kind, adapter, **train)
            found[low_bytes] = what_gives_z(dispatches)
        beside, apart = found.values()
        assert [a for _, a in beside] == [a for _, a in apart]
        assert "rmsnorm" not in {template for template, _ in apart}
        by_norm = [template for template, _ in beside].count("rmsnorm")
        assert by_norm > 0 or adapter is own or name.startswith(_WITHOUT_PRE_NORMS)


def what_gives_z(dispatches: Sequence[Dispatch]) -> list[tuple[str, int]]:
    """For each product with factors, forward, what wrote its z, and where the A of that lies."""
    last: dict[int, Dispatch] = {}
    found = []
    for dispatch in dispatches:
        adapted = dispatch.template.startswith("matmul") and dispatch.constants.get("members")
        if adapted and not dispatch.constants["transposed"]:
            x, z = dispatch.tensors[1], dispatch.tensors[4]
            writer = last[id(z.buffer)]
            by_norm = writer.template == "rmsnorm"
            assert by_norm or writer.template in ("lora_project", "lora_project_matrix")
            if by_norm:
                assert writer.constants["low_width"] == z.shape[1]
                assert last[id(x.buffer)] is writer and writer.tensors[3].buffer is x.buffer
            else:
                assert writer.tensors[1].buffer is x.buffer
            found.append((writer.template, writer.tensors[-2 if by_norm else 2].offset))
        for binding in written(dispatch):
            last[id(dispatch.tensors[binding].buffer)] = dispatch
    return found
