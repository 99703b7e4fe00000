"""The whole step within WebGPU's default limits, which every device must offer."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora.shaders.device import Device
from lora.training.session import TrainingSession
from tests.support.tiny_models import TINY_MODELS
from tests.support.tiny_ours import gradients, open_session

# https://www.w3.org/TR/webgpu/#limits
DEFAULTS = {
    "max-storage-buffer-binding-size": 128 << 20,
    "max-buffer-size": 256 << 20,
    "max-compute-workgroup-storage-size": 16384,
    "max-compute-invocations-per-workgroup": 256,
    "max-compute-workgroup-size-x": 256,
    "max-compute-workgroup-size-y": 256,
    "max-storage-buffers-per-shader-stage": 8,
}


@pytest.mark.parametrize(
    ("name", "is_cpu", "precision"),
    [
        ("llama_bias", True, "f32"),
        ("gemma3", True, "f32"),
        ("llama_bias", False, "f32"),
        ("gemma3", False, "f16"),
    ],
)
def test_a_step_within_the_default_limits(
    name: str,
    is_cpu: bool,
    precision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same loss and gradients as with the adapter's own limits.

    Limits decide between tiles, and tiles the order of sums: f32 rounding may differ.
    """
    model = TINY_MODELS[name]
    model.write_gguf(tmp_path / "model.gguf")
    model.write_adapter(tmp_path / "adapter")
    results = []
    for limits in (None, DEFAULTS):

        def device(
            wanted: str | int, limits: dict[str, int] | None = limits, webgpu: str = "auto"
        ) -> Device:
            opened = Device(wanted, limits, webgpu)
            opened.facts = replace(opened.facts, is_cpu=is_cpu)
            return opened

        monkeypatch.setattr("lora.training.session.Device", device)
        session: TrainingSession = open_session(
            model, tmp_path / "model.gguf", tmp_path / "adapter", recompute="on",
            precision=precision,
        )  # fmt: skip
        if limits is not None:
            for key, value in limits.items():
                assert session.device.handle.limits[key] == value, key
        results.append(gradients(session))
    own, default = results
    # f16 rounds to 2^-12 after other sums; see test_precision.py.
    loss, gradient_bound = (1e-6, 2e-5) if precision == "f32" else (1e-3, 2e-2)
    assert default.loss == pytest.approx(own.loss, rel=loss)
    for path, gradient in own.gradients.items():
        largest = np.abs(gradient).max()
        np.testing.assert_allclose(default.gradients[path], gradient, atol=gradient_bound * largest)
