"""The inner calls of wgpu-py that we rely on, and what is made of its errors."""

import os

import numpy as np
import pytest

from lora.shaders.device import Device, implementation
from lora.shaders.errors import GPUError
from lora.shaders.readback import ReadbackRing
from lora.shaders.webgpu import Use

CODE = """
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) at: vec3<u32>) { out[at.x] += at.x + 1u; }
"""


@pytest.mark.parametrize("checked", [False, True])
def test_dispatches_run_in_order(device: Device, checked: bool) -> None:
    handle = device.handle
    kernel = handle.compile("count", CODE, checked=checked)
    out = device.memory.empty((128,), "u32")
    group = handle.bind_group(kernel, [(out.buffer, 0, out.n_bytes)])
    encoder = handle.encoder()
    encoder.dispatches([(kernel, group, (2, 1, 1)), (kernel, group, (1, 1, 1))])
    handle.submit(encoder.finish())
    expected = np.arange(1, 129) * np.where(np.arange(128) < 64, 2, 1)
    assert (device.memory.read(out) == expected).all()


@pytest.mark.parametrize("checked", [False, True])
def test_wrong_code_is_an_error(device: Device, checked: bool) -> None:
    with pytest.raises(GPUError, match="expected"):
        device.handle.compile("wrong", "fn main( {", checked=checked)


def test_a_wrong_dispatch_is_an_error_when_the_encoder_finishes(device: Device) -> None:
    """Our calls go without an error scope each: what is wrong must still not pass in silence."""
    handle = device.handle
    kernel = handle.compile("count", CODE, checked=False)
    out = device.memory.empty((64,), "u32")
    encoder = handle.encoder()
    group = handle.bind_group(kernel, [(out.buffer, 0, out.n_bytes)])
    encoder.dispatches([(kernel, group, (70_000, 1, 1))])
    with pytest.raises(GPUError, match="70000|dispatch"):
        handle.submit(encoder.finish())


def test_a_buffer_too_large_is_an_error(device: Device) -> None:
    with pytest.raises(GPUError):
        device.handle.create_buffer(2 * device.facts.max_buffer + 256, Use.STORAGE)


def test_results_come_back_without_the_polling_thread(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once woken, it waits for all that was submitted and keeps others from submitting."""
    poller = device.handle.wgpu._poller  # type: ignore[attr-defined]

    def refuse() -> None:
        raise AssertionError("the polling thread was woken")

    monkeypatch.setattr(poller, "get_token", refuse)
    ring = ReadbackRing(device.memory, 8, slots=2)
    for first in range(5):  # more than there are slots
        ring.push(device.memory.upload(np.array([first, 0.5], np.float32)), np.ndarray.tolist)
    assert [ring.take(), ring.take()] == [[0.0, 0.5], [1.0, 0.5]]
    assert ring.ready(wait=True) == [[2.0, 0.5], [3.0, 0.5], [4.0, 0.5]]
    assert device.handle.wgpu._poller is poller  # type: ignore[attr-defined]


def test_the_environment_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Vulkan loader is spared a warning, and nobody else sees the variable."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    before = dict(os.environ)
    assert implementation().found()
    assert dict(os.environ) == before
