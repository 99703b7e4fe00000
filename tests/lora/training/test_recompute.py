"""How many layers are run again: as few as the memory asks for, and to the same bits."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora.config.schema import load_config
from lora.config.sizes import size_of
from lora.shaders.device import Device
from lora.shaders.errors import InputError
from lora.shaders.facts import DeviceFacts
from lora.shaders.memory import CountingMemory, padded_bytes
from lora.shaders.recording import Recording
from lora.training import recompute
from lora.training.device_state import SessionPlan
from lora.training.recompute import layer_bytes, memory_limit
from lora.training.session import TrainingSession
from lora.training.workload import Workload
from tests.support.tiny_run import write_run

GIB = 1 << 30


@pytest.fixture
def facts(device: Device) -> DeviceFacts:
    """Of a GPU that tells nothing of its memory, without matrix units."""
    return replace(device.facts, is_cpu=False, device_memory=None, name="A card", matrix_shapes=())


def plan_of(path: Path, facts: DeviceFacts, *overrides: str) -> SessionPlan:
    workload = Workload.open(load_config(str(path), overrides), train=True)
    return SessionPlan.of(facts, workload)


def total(plan: SessionPlan) -> int:
    return sum(plan.allocated.values())


def test_as_few_layers_as_the_limit_allows(tmp_path: Path, facts: DeviceFacts) -> None:
    """Each limit between all and nothing has a number of layers; what is counted keeps to it."""
    path = write_run(tmp_path)
    layers = plan_of(path, facts).tensors.step.model.architecture.n_layers
    kept, again = (plan_of(path, facts, f"train.recompute={s}") for s in ("off", "on"))
    assert (kept.tensors.recomputed, again.tensors.recomputed) == (0, layers)
    assert layers > 2 and total(again) < total(kept)
    counts = []
    for limit in range(total(kept), total(again) - 1, -(total(kept) - total(again)) // 7):
        plan = plan_of(path, facts, f"train.memory_limit='{limit}'")
        counts.append(plan.tensors.recomputed)
        assert total(plan) <= limit
    assert counts[0] == 0 and counts == sorted(counts) and len(set(counts)) > 2
    tight = plan_of(path, facts, f"train.memory_limit='{total(again) // 2}'")
    assert tight.tensors.recomputed == layers  # the least there is: it may fit yet


def test_some_layers_again_give_the_same_bits_and_take_what_is_planned(
    tmp_path: Path, device: Device
) -> None:
    path = write_run(tmp_path)
    kept, again = (plan_of(path, device.facts, f"train.recompute={s}") for s in ("off", "on"))
    half = f"train.memory_limit='{(total(kept) + total(again)) // 2}'"
    with TrainingSession(load_config(str(path), [half])) as session:
        assert 0 < session.recomputed_layers < again.tensors.recomputed
        assert session.plan.allocated == session.device.allocated
    found = []
    for setting in (half, "train.recompute=off"):
        with TrainingSession(load_config(str(path), [setting])) as session:
            for batches in session.stream or ():
                session.step(batches)
            found.append(session.parameters().tobytes())
    assert found[0] == found[1]


def test_what_is_kept_of_a_layer(tmp_path: Path, facts: DeviceFacts) -> None:
    """Nothing that the backward writes again: what norms and the gate give is in one place."""
    plan = plan_of(write_run(tmp_path), facts, "train.recompute=off")
    step = plan.tensors.step
    rows, spec = step.inputs.rows.maximum, step.model.layers[0].spec
    mixer, gate_up = spec.mixer, 2 * spec.feed_forward.intermediate_size
    z = [members * step.layout.padded_rank for members in (3, 1, 2, 1)]
    widths = [mixer.qkv_size, mixer.query_size, mixer.n_heads, spec.hidden_size, gate_up, *z]
    kept = sum(padded_bytes((rows, width)) for width in widths)
    counting = Recording(facts, CountingMemory(facts))
    shared = step.activations.shared
    assert layer_bytes(counting, plan.workload, step.model, step.inputs, shared) == [kept, kept, 0]
    again = plan_of(tmp_path / "config.yaml", facts, "train.recompute=on")
    assert total(plan) - total(again) == 2 * kept


def test_what_tells_the_memory(facts: DeviceFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(
            stdout="8192, 8000, NVIDIA A\n24576, 1000, NVIDIA B\n4096, 4000, NVIDIA A\nx\n"
        )

    monkeypatch.setattr(subprocess, "run", run)
    recompute._of_nvidia.cache_clear()
    try:
        assert memory_limit(facts, "7GiB") == 7 * GIB
        assert memory_limit(facts, "auto") is None and not asked  # nothing to ask of that card
        assert memory_limit(replace(facts, device_memory=10 * GIB), "auto") == int(8.5 * GIB)
        assert memory_limit(replace(facts, name="NVIDIA A"), "auto") == int(0.85 * 4 * GIB)
        busy = replace(facts, name="NVIDIA B", device_memory=24 * GIB)  # others have most of it
        assert memory_limit(busy, "auto") == int(0.95 * (1000 << 20))
        assert memory_limit(replace(facts, name="NVIDIA C"), "auto") is None
        assert memory_limit(replace(facts, is_cpu=True, device_memory=GIB), "auto") is None
    finally:
        recompute._of_nvidia.cache_clear()


def test_a_machine_without_nvidia_smi(facts: DeviceFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    recompute._of_nvidia.cache_clear()
    assert memory_limit(replace(facts, name="NVIDIA D"), "auto") is None
    recompute._of_nvidia.cache_clear()


def test_without_a_limit_few_activations_are_kept(
    tmp_path: Path, facts: DeviceFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_run(tmp_path)
    assert plan_of(path, facts).tensors.recomputed == 0
    monkeypatch.setattr(recompute, "KEPT_ACTIVATIONS_LIMIT", 1000)
    layers = plan_of(path, facts, "train.recompute=on").tensors.recomputed
    assert plan_of(path, facts).tensors.recomputed == layers


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("7GiB", 7 * GIB), ("7.5 gib", 15 * GIB // 2), ("800MB", 8 * 10**8), ("1T", 10**12),
     ("12345", 12345), ("12345B", 12345), ("1.5 KiB", 1536)],
)  # fmt: skip
def test_sizes(text: str, n_bytes: int) -> None:
    assert size_of(text) == n_bytes


@pytest.mark.parametrize("text", ["7 GiBs", "-1GiB", "0", "many", "1e3", "GiB", "", "9" * 40])
def test_no_sizes(tmp_path: Path, text: str) -> None:
    path = write_run(tmp_path)
    with pytest.raises(InputError, match=r"train.memory_limit: got .*allowed here: auto, or"):
        load_config(str(path), [f"train.memory_limit='{text}'"])
