"""Dawn, Chromium's implementation, behind shaders/webgpu.py: through wgpudawn and its inner parts.

It reaches a GPU's matrix units. The dependency is an alpha and pinned to one version;
tests/shaders/test_dawn.py holds what is used here of its inner functions.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any, ClassVar

import wgpudawn
from wgpudawn.backends import dawn
from wgpudawn.backends.dawn import _api, extras

from lora.shaders.errors import GPUError
from lora.shaders.python_api import PythonDevice, quiet_loader, translated
from lora.shaders.webgpu import Found, MatrixShape

# Experimental features are refused without the first; without the second NVIDIA has no shader-f16.
_ENABLED = ("allow_unsafe_apis", "vulkan_enable_f16_on_nvidia")
# With it timestamps come in steps of 0.1 ms.
_DISABLED = ("timestamp_quantization",)
# Of a device whose kernels run without clamped indices. On Vulkan this takes the driver's robust
# access away, too, so that an index out of range may reach beyond its buffer.
_UNCHECKED = ("disable_robustness",)
_UNCHECKED_ON = ("Vulkan", "D3D12")
# Asked for wherever it is listed: several threads compile for one device (forward/plans/tuning.py).
_SYNCHRONIZED = "implicit-device-synchronization"
# wgpudawn raises RuntimeError for devices and results that do not come.
_ERRORS = (wgpudawn.GPUError, RuntimeError)
_OPENING = Lock()  # of the one instance, of which devices are asked
_NULL = ("Null",)  # Dawn's device that computes nothing
# What Dawn writes of drivers: that it lowers a limit, or takes no device of one, and why.
_NOTE = re.compile(r"^Warning: (.*)\n(?:[ \t].*\n|\n)*", re.MULTILINE)


class Dawn:
    """See `webgpu.Implementation`.

    Raises:
        GPUError: something else in this process has used wgpudawn before, which keeps its settings.
    """

    name = "Dawn"
    setting = "dawn"
    package = "wgpudawn"
    version: str = wgpudawn.__version__
    library_version: str = dawn.__version__
    _instance_is_set = False
    _said: ClassVar[list[str]] = []  # what Dawn says of drivers, once in a process

    def __init__(self) -> None:
        with _OPENING, quiet_loader(), translated(_ERRORS):
            if not Dawn._instance_is_set:
                extras.set_instance_extras(enable_toggles=_ENABLED, disable_toggles=_DISABLED)
                Dawn._instance_is_set = True

    def found(self) -> list[Found]:
        """See `webgpu.Implementation`.

        Raises:
            GPUError: there is none, and Dawn says why.
        """
        with _OPENING:
            adapters, notes = _adapters()
            self._said.extend(notes)
            if self._said and not adapters:
                raise GPUError(self._said[0].removesuffix("."))
            return [_Found(self, key, adapter) for key, adapter in adapters.items()]


def _adapters() -> tuple[dict[tuple[Any, ...], Any], list[str]]:
    """The GPUs by what tells them apart, each adapter good for one device; and Dawn's notes.

    Not wgpudawn's own listing: that leaves out all but the first of several cards of one model.
    """
    adapters: dict[tuple[Any, ...], Any] = {}
    with quiet_loader(), _notes() as notes, translated(_ERRORS):
        for adapter in dawn.gpu._enumerate_all_adapters():
            info = adapter.info
            if info["backend_type"] in _NULL:
                continue
            own = extras.get_adapter_properties(adapter)
            place = own.get("vulkan_uuids", {}).get("device_uuid"), own.get("d3d", {}).get("luid")
            named = (info["backend_type"], info["vendor_id"], info["device_id"], info["device"])
            adapters.setdefault((*named, *place), adapter)
    return adapters, notes


class _Found:
    """See `webgpu.Found`.

    Args:
        key: of `_adapters`.
    """

    def __init__(self, implementation: Dawn, key: tuple[Any, ...], adapter: Any) -> None:
        self.implementation = implementation
        self._key = key
        self._adapter: Any = adapter
        self.info: dict[str, Any] = dict(adapter.info)
        self.features = frozenset(adapter.features)
        self.limits: dict[str, int] = dict(adapter.limits)
        self.trusts_kernels = self.info["backend_type"] in _UNCHECKED_ON
        self.subgroup_lanes = _subgroup_lanes(adapter)
        own = extras.get_adapter_properties(adapter)
        heaps = own.get("memory_heaps", ())
        local = [int(heap["size"]) for heap in heaps if "device-local" in heap["properties"]]
        self.device_memory = max(local, default=None)
        self.matrix_shapes = tuple(
            MatrixShape(
                config["m"],
                config["n"],
                config["k"],
                str(config["component_type"]),
                str(config["result_component_type"]),
                config["min_subgroup_size"],
                config["max_subgroup_size"],
            )
            for config in own.get("subgroup_matrix_configs", ())
        )

    def open(
        self, features: Iterable[str], limits: Mapping[str, int], *, checked: bool
    ) -> DawnDevice:
        """See `webgpu.Found`."""
        asked = {*features} | ({_SYNCHRONIZED} & self.features)
        with _OPENING, quiet_loader(), _notes(), translated((*_ERRORS, KeyError)):
            adapter, self._adapter = self._adapter, None
            if adapter is None:  # it has made its device
                adapter = _adapters()[0].get(self._key)
            if adapter is None:
                raise GPUError(f"{self.info['device']} is gone")
            device = extras.request_device_sync(
                adapter,
                required_features=sorted(asked),
                required_limits=dict(limits),
                enable_toggles=() if checked else _UNCHECKED,
            )
        return DawnDevice(device, wgpudawn, _api, _ERRORS)


class DawnDevice(PythonDevice):
    """See `webgpu.OpenDevice`."""

    _compiling = Lock()  # scopes of errors are the device's: one at a time

    def release_staging(self) -> None:
        """See `webgpu.OpenDevice`. Dawn hands back what was used up when it looks for events."""
        super().release_staging()
        self.poll()

    def compile(self, label: str, code: str) -> Any:
        """See `webgpu.OpenDevice`."""
        # In a scope: else wgpudawn gives an error to whichever call of any thread looks first.
        with self._compiling, translated(self._errors):
            self.wgpu.push_error_scope("validation")
            module = self._module(label, code)
            refused = self.wgpu.pop_error_scope_async()
            promise = self.wgpu.create_compute_pipeline_async(
                label=label, layout="auto", compute={"module": module, "entry_point": "main"}
            )
        # Outside of the lock: Dawn compiles in threads of its own, and tells the promise alone of
        # what is wrong.
        with translated(self._errors):
            error = refused.sync_wait()
            if error is not None:
                raise GPUError(str(error))
            return promise.sync_wait()


def _subgroup_lanes(adapter: Any) -> tuple[int, int]:
    """Least and most lanes of a subgroup; wgpudawn's own description has constants there."""
    info = _api.new_struct_p("WGPUAdapterInfo *")
    _api.libf.wgpuAdapterGetInfo(adapter._internal, info)
    lanes = int(info.subgroupMinSize), int(info.subgroupMaxSize)
    _api.libf.wgpuAdapterInfoFreeMembers(info[0])
    return lanes


@contextmanager
def _notes() -> Iterator[list[str]]:
    """Takes what Dawn writes of drivers off the process's stderr; yields it, complete at the end.

    All else that is written meanwhile follows after.
    """
    notes: list[str] = []
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (OSError, ValueError, AttributeError):  # there is no stderr
        yield notes
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield notes
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            text = file.read().decode(errors="replace")
            notes += _NOTE.findall(text)
            os.write(2, _NOTE.sub("", text).encode())
