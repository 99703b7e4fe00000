"""The inner calls of wgpu-py that we rely on; what Dawn has in common is in test_webgpu.py."""

import numpy as np
import pytest

from lora.shaders.device import Device
from lora.shaders.readback import ReadbackRing


def test_results_come_back_without_the_polling_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once woken, it waits for all that was submitted and keeps others from submitting."""

    def refuse() -> None:
        raise AssertionError("the polling thread was woken")

    with Device(webgpu="wgpu") as device:
        poller = device.handle.wgpu._poller  # type: ignore[attr-defined]
        monkeypatch.setattr(poller, "get_token", refuse)
        ring = ReadbackRing(device.memory, 8, slots=2)
        for first in range(5):  # more than there are slots
            ring.push(device.memory.upload(np.array([first, 0.5], np.float32)), np.ndarray.tolist)
        assert [ring.take(), ring.take()] == [[0.0, 0.5], [1.0, 0.5]]
        assert ring.ready(wait=True) == [[2.0, 0.5], [3.0, 0.5], [4.0, 0.5]]
        assert device.handle.wgpu._poller is poller  # type: ignore[attr-defined]


def test_no_matrix_units_are_promised() -> None:
    """wgpu-native lists cooperative matrices, but wgpu-py can't ask for them."""
    with Device(webgpu="wgpu") as device:
        assert device.facts.matrix_shapes == () and device.facts.subgroup_lanes is None
        assert device.facts.software.startswith("wgpu-native 0.32.")
