"""What every test may ask for: the device (the software adapter in CI) and the real models."""

from __future__ import annotations

from pathlib import Path

import pytest

from shaders.device import Device

MODELS = Path(__file__).parent.parent / "models"


@pytest.fixture(scope="session")
def device() -> Device:
    return Device()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    path = MODELS / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        pytest.skip("models/SmolLM2-135M-Instruct.Q4_1.gguf is absent: lora pull smollm2-135m")
    return path
