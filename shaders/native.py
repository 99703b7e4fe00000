"""What wgpu-native can do and wgpu-py 0.32 doesn't offer, through wgpu-py's inner functions.

The dependency is pinned below 0.33, and tests/shaders/test_native.py holds what is used here.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import wgpu

_NO_CHECKS = 0  # WGPUShaderRuntimeChecks_None of wgpu.h


@cache
def _inner() -> Any:
    """wgpu-py's module of inner functions; its import parses wgpu.h, a third of a second."""
    from wgpu.backends.wgpu_native import _api

    return _api


def trusted_shader_module(device: wgpu.GPUDevice, label: str, code: str) -> wgpu.GPUShaderModule:
    """Compiles WGSL as `device.create_shader_module` does, without run-time checks.

    For code it can't trust wgpu clamps every dynamic index and counts the turns of every loop. Our
    kernels are our own: their loops end and their indices stay in range, and the checks cost a
    tenth of a matmul's speed (docs/log.md). Vulkan's robust buffer access stays on: a stray read
    cannot leave its buffer.

    Raises:
        wgpu.GPUValidationError: the code is wrong.
    """
    api = _inner()
    source = api.new_struct_p("WGPUShaderSourceWGSL *", code=api.to_c_string_view(code))
    source[0].chain.next = api.ffi.NULL
    source[0].chain.sType = api.lib.WGPUSType_ShaderSourceWGSL
    descriptor = api.new_struct_p(
        "WGPUShaderModuleDescriptor *",
        nextInChain=api.ffi.cast("WGPUChainedStruct *", source),
        label=api.to_c_string_view(label),
    )
    module = api.libf.wgpuDeviceCreateShaderModuleTrusted(device._internal, descriptor, _NO_CHECKS)
    return api.GPUShaderModule(label, module, device)


def encode_dispatches(
    compute_pass: wgpu.GPUComputePassEncoder,
    dispatches: Iterable[tuple[Any, Any, tuple[int, int, int]]],
) -> None:
    """Appends dispatches to a pass, each (pipeline, bind group, workgroups).

    As the pass's own methods do, but without their error scope around each of three calls: a step
    has a thousand dispatches. What is wrong shows when the encoder finishes.
    """
    lib, no_offsets = _inner().lib, _inner().ffi.NULL
    set_pipeline = lib.wgpuComputePassEncoderSetPipeline
    set_bind_group = lib.wgpuComputePassEncoderSetBindGroup
    dispatch = lib.wgpuComputePassEncoderDispatchWorkgroups
    inner = compute_pass._internal
    last = None
    for pipeline, bind_group, (x, y, z) in dispatches:
        if pipeline is not last:
            set_pipeline(inner, pipeline._internal)
            last = pipeline
        set_bind_group(inner, 0, bind_group._internal, 0, no_offsets)
        dispatch(inner, x, y, z)


class _NoPoller:
    """Stands in for a device's polling thread: nothing is to be waited for there."""

    def get_token(self) -> _NoPoller:
        return self

    def set_done(self) -> None:
        """The end of what was never begun."""


def map_for_reading(buffer: wgpu.GPUBuffer) -> Any:
    """Asks for a buffer to be mapped; `device._poll()` finds out when it is.

    `buffer.map_async` wakes a thread of wgpu-py that waits until all submitted work is done, and
    while it waits nobody else can submit: a GPU stood still between steps (docs/log.md). It also
    submits an empty command buffer first, which the copy into this buffer has made needless.

    Returns:
        wgpu-py's promise, to be waited for with `sync_wait` once its `_state` isn't "pending".
    """
    device = buffer._device
    poller, device._poller = device._poller, _NoPoller()
    try:
        return buffer.map_async("READ_NOSYNC")
    finally:
        device._poller = poller
