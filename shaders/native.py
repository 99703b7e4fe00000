"""wgpu-native behind shaders/webgpu.py, through wgpu-py and, where that offers too little, through
wgpu-py's inner functions.

The dependency is pinned below 0.33, and tests/shaders/test_native.py holds what is used here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from threading import Lock
from typing import Any

import wgpu

from lora.shaders.python_api import PythonDevice, PythonMapped, quiet_loader, translated
from lora.shaders.webgpu import Buffer, Found, MatrixShape

_NO_CHECKS = 0  # WGPUShaderRuntimeChecks_None of wgpu.h
# wgpu-native (wgpu-py 0.32) ended the process where two threads opened devices at once (H100).
_OPENING = Lock()
_ERRORS = (wgpu.GPUError,)
_OWN_NAMES = {"subgroups": "subgroup"}  # WebGPU's names of features, and wgpu-py's
# wgpu-native asks Vulkan for robust buffer access and D3D12 has it for descriptor tables; Metal
# has none.
_BOUNDS_ARE_KEPT = ("Vulkan", "D3D12")


@cache
def _inner() -> Any:
    """wgpu-py's module of inner functions; its import parses wgpu.h, a third of a second."""
    from wgpu.backends.wgpu_native import _api

    return _api


class WgpuNative:
    """See `webgpu.Implementation`."""

    name = "wgpu-native"
    setting = "wgpu"
    package = "wgpu"
    version: str = wgpu.__version__

    @property
    def library_version(self) -> str:
        """See `webgpu.Implementation`."""
        from wgpu.backends import wgpu_native

        return str(wgpu_native.__version__)

    def found(self) -> list[Found]:
        """See `webgpu.Implementation`."""
        with _OPENING, quiet_loader():
            return [_Found(self, adapter) for adapter in wgpu.gpu.enumerate_adapters_sync()]


class _Found:
    """See `webgpu.Found`."""

    # wgpu-native lists cooperative matrices, and offers no way to ask for them.
    matrix_shapes: tuple[MatrixShape, ...] = ()
    device_memory: int | None = None
    subgroup_lanes: tuple[int, int] | None = None  # wgpu-py gives constants

    def __init__(self, implementation: WgpuNative, adapter: wgpu.GPUAdapter) -> None:
        self.implementation = implementation
        self._adapter = adapter
        self.info: dict[str, Any] = dict(adapter.info)
        names = {own: name for name, own in _OWN_NAMES.items()}
        self.features = frozenset(names.get(own, own) for own in adapter.features)
        self.limits: dict[str, int] = dict(adapter.limits)
        self.trusts_kernels = self.info["backend_type"] in _BOUNDS_ARE_KEPT

    def open(
        self, features: Iterable[str], limits: Mapping[str, int], *, checked: bool
    ) -> NativeDevice:
        """See `webgpu.Found`."""
        asked = sorted(_OWN_NAMES.get(name, name) for name in features)
        with _OPENING, quiet_loader(), translated((*_ERRORS, RuntimeError)):
            device = self._adapter.request_device_sync(
                required_features=asked, required_limits=dict(limits)
            )
        return NativeDevice(device, checked=checked)


class NativeDevice(PythonDevice):
    """See `webgpu.OpenDevice`."""

    def __init__(self, device: wgpu.GPUDevice, *, checked: bool) -> None:
        super().__init__(device, wgpu, _inner(), _ERRORS)
        self._checked = checked

    def map_for_reading(self, buffer: Buffer) -> PythonMapped:
        """See `webgpu.OpenDevice`.

        wgpu-py's own "READ" submits an empty command buffer first, which the copy into this buffer
        has made needless.
        """
        return self._mapped(buffer, "READ_NOSYNC")

    def _mapped(self, buffer: Buffer, mode: str) -> PythonMapped:
        """Without wgpu-py's thread.

        Its `map_async` wakes a thread that waits until all submitted work is done, and while
        it waits nobody else can submit: a GPU stood still between steps (docs/log.md).
        """
        poller, self.wgpu._poller = self.wgpu._poller, _NoPoller()
        try:
            return super()._mapped(buffer, mode)
        finally:
            self.wgpu._poller = poller

    def _module(self, label: str, code: str) -> wgpu.GPUShaderModule:
        """Compiles WGSL, without run-time checks where the device was opened so.

        For code it can't trust wgpu clamps every dynamic index and counts the turns of every loop.
        Our kernels are our own: their loops end and their indices stay in range, and the checks
        cost a tenth of a matmul's speed (docs/log.md). The driver's robust buffer access stays on:
        a stray read cannot leave its buffer.
        """
        if self._checked:
            return super()._module(label, code)
        api, device = _inner(), self.wgpu
        source = api.new_struct_p("WGPUShaderSourceWGSL *", code=api.to_c_string_view(code))
        source[0].chain.next = api.ffi.NULL
        source[0].chain.sType = api.lib.WGPUSType_ShaderSourceWGSL
        descriptor = api.new_struct_p(
            "WGPUShaderModuleDescriptor *",
            nextInChain=api.ffi.cast("WGPUChainedStruct *", source),
            label=api.to_c_string_view(label),
        )
        module = api.libf.wgpuDeviceCreateShaderModuleTrusted(
            device._internal, descriptor, _NO_CHECKS
        )
        return api.GPUShaderModule(label, module, device)


class _NoPoller:
    """Stands in for a device's polling thread: nothing is to be waited for there."""

    def get_token(self) -> _NoPoller:
        return self

    def set_done(self) -> None:
        """The end of what was never begun."""
