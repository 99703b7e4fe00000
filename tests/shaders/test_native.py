"""The inner calls of wgpu-py that we rely on."""

import numpy as np
import pytest
import wgpu

from lora.shaders.device import Device
from lora.shaders.native import encode_dispatches, trusted_shader_module
from lora.shaders.program import ReadbackRing

CODE = """
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) at: vec3<u32>) { out[at.x] += at.x + 1u; }
"""


def pipeline(device: Device) -> wgpu.GPUComputePipeline:
    module = trusted_shader_module(device.wgpu, "count", CODE)
    return device.wgpu.create_compute_pipeline(
        layout="auto", compute={"module": module, "entry_point": "main"}
    )


def test_dispatches_run_in_order_on_a_trusted_module(device: Device) -> None:
    kernel = pipeline(device)
    out = device.empty((128,), "u32")
    group = device.bind_group(kernel, [out])
    encoder = device.wgpu.create_command_encoder()
    compute_pass = encoder.begin_compute_pass()
    encode_dispatches(compute_pass, [(kernel, group, (2, 1, 1)), (kernel, group, (1, 1, 1))])
    compute_pass.end()
    device.queue.submit([encoder.finish()])
    expected = np.arange(1, 129) * np.where(np.arange(128) < 64, 2, 1)
    assert (device.read(out) == expected).all()


def test_wrong_code_is_an_error(device: Device) -> None:
    with pytest.raises(wgpu.GPUError, match="expected"):
        trusted_shader_module(device.wgpu, "wrong", "fn main( {")


def test_a_wrong_dispatch_is_an_error_when_the_encoder_finishes(device: Device) -> None:
    """Our calls go without an error scope each: what is wrong must still not pass in silence."""
    kernel = pipeline(device)
    group = device.bind_group(kernel, [device.empty((64,), "u32")])
    encoder = device.wgpu.create_command_encoder()
    compute_pass = encoder.begin_compute_pass()
    encode_dispatches(compute_pass, [(kernel, group, (70_000, 1, 1))])
    compute_pass.end()
    with pytest.raises(wgpu.GPUError, match="70000|dispatch"):
        device.queue.submit([encoder.finish()])


def test_results_come_back_without_the_polling_thread(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once woken, it waits for all that was submitted and keeps others from submitting."""
    poller = device.wgpu._poller

    def refuse() -> None:
        raise AssertionError("the polling thread was woken")

    monkeypatch.setattr(poller, "get_token", refuse)
    ring = ReadbackRing(device, 8, slots=2)
    for first in range(5):  # more than there are slots
        ring.push(device.upload(np.array([first, 0.5], np.float32)), np.ndarray.tolist)
    assert [ring.take(), ring.take()] == [[0.0, 0.5], [1.0, 0.5]]
    assert ring.ready(wait=True) == [[2.0, 0.5], [3.0, 0.5], [4.0, 0.5]]
    assert device.wgpu._poller is poller
