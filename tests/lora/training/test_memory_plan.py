"""What a run takes on a device, counted without one, and what is said where it doesn't fit."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lora.commands.plan import print_plan
from lora.config.schema import Config
from lora.data.examples import Example
from lora.shaders.device import Device
from lora.shaders.errors import DeviceMemoryError, GPUError, InputError
from lora.shaders.webgpu import Use
from lora.training.device_state import SessionPlan
from lora.training.session import TrainingSession
from lora.training.workload import Workload
from tests.support.tiny_gguf import write_tiny_llama


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "tiny.gguf"
    write_tiny_llama(path, types={"weight": "Q8_0"})
    return Config.model_validate(
        {
            "model": {"path": str(path)},
            "adapter": {"rank": 4, "targets": ["q_proj", "down_proj", "lm_head"]},
            "data": {"train": "none", "max_length": 64},
            "train": {"steps": 1, "batch_size": 2, "tuning": "off"},
            "output": "none",
        }
    )


EXAMPLES = [Example(np.full(50, 7, np.int32), np.arange(50) > 3, i) for i in range(3)]


@pytest.mark.parametrize("recompute", ["on", "off"])
@pytest.mark.parametrize("is_cpu", [True, False])
def test_a_plan_counts_what_is_taken(config: Config, recompute: str, is_cpu: bool) -> None:
    train = config.train.model_copy(update={"recompute": recompute})
    config = config.model_copy(update={"train": train})
    device = Device()
    device.facts = replace(device.facts, is_cpu=is_cpu)
    session = TrainingSession(config, examples=EXAMPLES, device=device)
    planned = SessionPlan.of(device.facts, session.workload).allocated
    assert planned == session.plan.allocated == device.allocated
    assert {"weights", "adapter", "gradients", "optimizer", "activations"} <= set(planned)


def test_a_model_that_does_not_fit(config: Config) -> None:
    device = Device()
    device.facts = replace(device.facts, memory_limit=300_000)
    with pytest.raises(InputError) as caught:
        TrainingSession(config, examples=EXAMPLES, device=device)
    message = str(caught.value)
    assert "tiny.gguf does not fit: " in message and "has 0 MiB of memory" in message
    assert "MiB (" in message and "activations" in message and "weights" in message
    assert "Lower train.batch_size or data.max_length, set train.recompute: on" in message


def test_a_refusal_of_the_device(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()

    def refuse(n_bytes: int, use: Use) -> None:
        raise GPUError("Not enough memory left.\nmore")

    monkeypatch.setattr(device.handle, "create_buffer", refuse)
    with pytest.raises(DeviceMemoryError, match=r"refused a buffer of .* \(Not enough memory left"):
        device.memory.empty((100,))


@pytest.mark.parametrize(("limit", "said"), [("0.1MiB", True), ("7GiB", False)])
def test_a_plan_above_the_limit_says_so(
    config: Config, device: Device, limit: str, said: bool
) -> None:
    """With all layers run again, too."""
    train = config.train.model_copy(update={"memory_limit": limit, "steps": 3})
    config = config.model_copy(update={"train": train})
    workload = Workload.open(config, train=True, examples=EXAMPLES)
    out = StringIO()
    print_plan(Console(file=out, width=400), SessionPlan.of(device.facts, workload))
    assert (f"train.memory_limit ({limit}) is 0 MiB; lower" in out.getvalue()) == said
    assert "\nsteps         3 (1.5 epochs), micro-batches" in out.getvalue()
