"""The device: its choice, its facts, its compiled pipelines and who has memory on it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any
from weakref import WeakSet

from lora.shaders.errors import DeviceMemoryError, GPUError, InputError
from lora.shaders.facts import DeviceFacts
from lora.shaders.memory import Arena
from lora.shaders.recording import Recording
from lora.shaders.templates import render
from lora.shaders.webgpu import Buffer, Found, Implementation, OpenDevice, Pipeline, Use

_WANTED_FEATURES = ("timestamp-query", "shader-f16", "subgroup")
_WANTED_LIMITS = (
    "max-buffer-size",
    "max-storage-buffer-binding-size",
    "max-compute-workgroup-storage-size",
    "max-compute-invocations-per-workgroup",
    "max-compute-workgroup-size-x",
    "max-compute-workgroup-size-y",
    "max-storage-buffers-per-shader-stage",
)
_COMPUTE_BACKENDS = ("Vulkan", "Metal", "D3D12")
_CHECKED = "LORA_CHECKED"  # of the environment: 1 compiles every kernel with run-time checks


def implementation() -> Implementation:
    """The implementation of WebGPU that is used."""
    from lora.shaders.native import WgpuNative  # wgpu only where a device is asked for

    return WgpuNative()


def list_devices() -> list[Found]:
    """The devices that can compute, in WebGPU's order; OpenGL's repeat these and are left out."""
    return [d for d in implementation().found() if d.info["backend_type"] in _COMPUTE_BACKENDS]


def choose_device(wanted: str | int = "auto") -> Found:
    """The device named by the config's `device:` key.

    Args:
        wanted: "auto" (a discrete GPU before an integrated one before a software driver), an index
            into `list_devices()`, or part of a name, in any case.

    Raises:
        InputError: no device at all, or none that fits.
    """
    found = list_devices()
    if not found:
        raise InputError(
            "WebGPU found no device on this machine. Install a Vulkan driver "
            "(Debian: apt-get install mesa-vulkan-drivers) and see `lora devices`."
        )
    listing = ", ".join(f"{i}: {a.info['device']}" for i, a in enumerate(found))
    text = str(wanted)
    if text == "auto":
        order = {"DiscreteGPU": 0, "IntegratedGPU": 1, "CPU": 2}
        return min(found, key=lambda a: order.get(a.info["adapter_type"], 3))
    if text.isdigit():
        if int(text) < len(found):
            return found[int(text)]
        raise InputError(f"device: {text}: there is no device of that index; there are {listing}.")
    for one in found:
        if text.lower() in one.info["device"].lower():
            return one
    raise InputError(f"device: {text!r}: no device has that in its name; there are {listing}.")


class Device:
    """One open WebGPU device: a context manager.

    Args:
        wanted: see `choose_device`.
        limits: limits to request in place of the device's own (tests ask for WebGPU's defaults).

    Attributes:
        facts: what recording must know of it.
        found: what it was opened from.
        handle: the implementation's device.
    """

    def __init__(self, wanted: str | int = "auto", limits: Mapping[str, int] | None = None) -> None:
        self.found = choose_device(wanted)
        features = [f for f in _WANTED_FEATURES if f in self.found.features]
        if limits is None:
            limits = {k: self.found.limits[k] for k in _WANTED_LIMITS if k in self.found.limits}
        self.handle: OpenDevice = self.found.open(features, limits)
        self.facts = DeviceFacts.of(self.found, features, self.handle.limits)
        self._checked = not self.found.bounds_are_kept or os.environ.get(_CHECKED) == "1"
        self._arenas: WeakSet[Arena] = WeakSet()
        self._pipelines: dict[tuple[str, str], Pipeline] = {}

    # -- memory ---------------------------------------------------------------------------------

    @property
    def allocated(self) -> Counter[str]:
        """Bytes by purpose, of all arenas together, in the order of the purposes' names."""
        total: Counter[str] = Counter()
        for arena in self._arenas:
            total.update(arena.allocated)
        return Counter({purpose: total[purpose] for purpose in sorted(total) if total[purpose]})

    @cached_property
    def memory(self) -> Arena:
        """An arena for what stays until the device is closed."""
        return self.arena()

    def arena(self) -> Arena:
        """A new owner of memory on this device."""
        return Arena(self)

    def recording(
        self,
        *,
        memory: Arena | None = None,
        precision: str = "f32",
        body: str | None = None,
        plans: Callable[[Any], Any] | None = None,
    ) -> Recording:
        """What programs are recorded with on this device; see `Recording`.

        Args:
            memory: by default the device's own arena.
        """
        owner = self.memory if memory is None else memory
        return Recording(self.facts, owner, precision, body, plans)

    def join(self, arena: Arena) -> None:
        """Counts an arena in `allocated` as long as it lives."""
        self._arenas.add(arena)

    def create_buffer(self, n_bytes: int, use: Use) -> Buffer:
        """A buffer of zeros, whose owner is who asks.

        Raises:
            DeviceMemoryError: there is no room for it.
        """
        taken = self.allocated.total()
        limit = self.facts.memory_limit
        if limit is not None and taken + n_bytes > limit:
            raise DeviceMemoryError(f"{self.facts.name} has {limit / 2**20:,.0f} MiB of memory")
        try:
            return self.handle.create_buffer(n_bytes, use)
        except GPUError as error:
            raise DeviceMemoryError(
                f"{self.facts.name} refused a buffer of {n_bytes / 2**20:,.0f} MiB after "
                f"{taken / 2**20:,.0f} MiB of others ({str(error).splitlines()[0]})"
            ) from error

    # -- pipelines ------------------------------------------------------------------------------

    def pipeline(self, template: str, constants: dict[str, Any]) -> Pipeline:
        """The compiled kernel of a WGSL template under its constants, compiled once.

        Raises:
            GPUError: the driver refuses it.
        """
        key = (template, repr(sorted(constants.items())))
        if key not in self._pipelines:
            self._pipelines[key] = self.compile(template, render(template, constants))
        return self._pipelines[key]

    def compile(self, label: str, code: str) -> Pipeline:
        """The pipeline of a kernel's WGSL text, whose entry point is `main`.

        Without run-time checks where the driver keeps every access inside its buffer, unless
        LORA_CHECKED=1 is set in the environment.
        """
        return self.handle.compile(label, code, checked=self._checked)

    # -- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        """Gives back all memory and the device; what was recorded on it cannot run any more."""
        for arena in list(self._arenas):
            arena.close()
        self._pipelines.clear()
        self.handle.close()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
