"""What a run takes on a device, counted without one, and what is said where it doesn't fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import wgpu

from lora.config.schema import Config
from lora.data.examples import Example
from lora.shaders.device import Device
from lora.shaders.errors import DeviceMemoryError, InputError
from lora.shaders.planning import PlanningDevice
from lora.training.session import TrainingSession
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
            "train": {"steps": 1, "batch_size": 2},
            "output": "none",
        }
    )


EXAMPLES = [Example(np.full(50, 7, np.int32), np.arange(50) > 3, i) for i in range(3)]


@pytest.mark.parametrize("recompute", ["on", "off"])
@pytest.mark.parametrize("body", ["wide", "tiled"])
def test_a_plan_counts_what_is_taken(config: Config, recompute: str, body: str) -> None:
    train = config.train.model_copy(update={"recompute": recompute})
    config = config.model_copy(update={"train": train})
    device = Device()
    device.matmul_body = body
    session = TrainingSession(config, examples=EXAMPLES, device=device)
    planned = PlanningDevice(device)
    TrainingSession(config, examples=EXAMPLES, device=planned)
    assert planned.allocated == session.device.allocated
    assert {"weights", "adapter", "gradients", "optimizer", "activations"} <= set(planned.allocated)


def test_a_model_that_does_not_fit(config: Config) -> None:
    device = Device()
    device.memory_limit = 300_000
    with pytest.raises(InputError) as caught:
        TrainingSession(config, examples=EXAMPLES, device=device)
    message = str(caught.value)
    assert "tiny.gguf does not fit: " in message and "has 0 MiB of memory" in message
    assert "MiB (" in message and "activations" in message and "weights" in message
    assert "Lower train.batch_size or data.max_length, set train.recompute: on" in message


def test_a_refusal_of_the_device(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()

    def refuse(**options: object) -> None:
        raise wgpu.GPUOutOfMemoryError("Not enough memory left.\nmore")

    monkeypatch.setattr(device.wgpu, "create_buffer", refuse)
    with pytest.raises(DeviceMemoryError, match=r"refused a buffer of .* \(Not enough memory left"):
        device.empty((100,))


def test_a_planning_device_holds_nothing() -> None:
    planned = PlanningDevice(Device())
    tensor = planned.upload(np.ones((3, 5)))
    assert tensor.shape == (3, 5) and planned.allocated["weights"] == 256
    with pytest.raises(ValueError, match="holds no data"):
        planned.read(tensor)
