"""Shader modules without the checks that wgpu adds for code it can't trust.

For web pages wgpu clamps every dynamic index and counts the turns of every loop. Our kernels are
our own: their loops end and their indices stay in range, and the checks cost up to half the speed
of a matmul (docs/log.md), because drivers no longer unroll and schedule across turns. Vulkan's
robust buffer access stays on: a stray read of a buffer cannot leave it.
"""

from __future__ import annotations

import wgpu
from wgpu.backends.wgpu_native import _api

_NO_CHECKS = 0  # WGPUShaderRuntimeChecks_None of wgpu.h


def trusted_shader_module(device: wgpu.GPUDevice, label: str, code: str) -> wgpu.GPUShaderModule:
    """Compiles WGSL as `device.create_shader_module` does, without run-time checks.

    wgpu-native has the call, wgpu-py 0.32 doesn't offer it: this goes through its inner functions
    (the dependency is pinned below 0.33).

    Raises:
        wgpu.GPUValidationError: the code is wrong.
    """
    source = _api.new_struct_p("WGPUShaderSourceWGSL *", code=_api.to_c_string_view(code))
    source[0].chain.next = _api.ffi.NULL
    source[0].chain.sType = _api.lib.WGPUSType_ShaderSourceWGSL
    descriptor = _api.new_struct_p(
        "WGPUShaderModuleDescriptor *",
        nextInChain=_api.ffi.cast("WGPUChainedStruct *", source),
        label=_api.to_c_string_view(label),
    )
    module = _api.libf.wgpuDeviceCreateShaderModuleTrusted(
        device._internal, descriptor, _NO_CHECKS
    )
    return _api.GPUShaderModule(label, module, device)
