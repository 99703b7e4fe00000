"""What every test may ask for: the device (the software driver in CI) and the real models."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest

from lora.shaders.device import Device

# One commit gives one result.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")

MODELS = Path(__file__).parent.parent / "models"


@pytest.fixture(scope="session")
def device() -> Device:
    return Device()


def _model(file: str, name: str) -> Path:
    path = MODELS / file
    if not path.exists():
        pytest.skip(f"models/{file} is absent: lora pull {name}")
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return _model("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    return _model("gemma-3-270m-q4_k_m.gguf", "gemma3-270m")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Shows what tests recorded as "print", a worker's too: the figures that CI is to tell."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "print":
                terminalreporter.write_line(str(text))
