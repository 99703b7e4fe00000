"""The device: its facts, its compiled pipelines and who has memory on it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any
from weakref import WeakSet

from lora.shaders.choice import Choice, choose_device, say_once
from lora.shaders.errors import DeviceMemoryError, GPUError, InputError
from lora.shaders.facts import DeviceFacts
from lora.shaders.memory import Arena
from lora.shaders.recording import Recording
from lora.shaders.templates import render
from lora.shaders.webgpu import MATRIX_FEATURE, Buffer, Found, OpenDevice, Pipeline, Use

_WANTED_FEATURES = ("timestamp-query", "shader-f16", "subgroups", MATRIX_FEATURE)
_WANTED_LIMITS = (
    "max-buffer-size",
    "max-storage-buffer-binding-size",
    "max-compute-workgroup-storage-size",
    "max-compute-invocations-per-workgroup",
    "max-compute-workgroup-size-x",
    "max-compute-workgroup-size-y",
    "max-storage-buffers-per-shader-stage",
)
COMPILING_THREADS = 8
_CHECKED = "LORA_CHECKED"  # of the environment: 1 compiles every kernel with run-time checks


class Device:
    """One open WebGPU device: a context manager.

    Args:
        wanted: see `choice.choose_device`.
        limits: limits to request in place of the device's own (tests ask for WebGPU's defaults).
        webgpu: the implementation, as the config's `webgpu:`.

    Attributes:
        facts: what recording must know of it.
        found: what it was opened from.
        handle: the implementation's device.

    Raises:
        InputError: there is no such device or implementation, or the driver makes no device of it.
    """

    def __init__(
        self,
        wanted: str | int = "auto",
        limits: Mapping[str, int] | None = None,
        webgpu: str = "auto",
    ) -> None:
        self.found, self.handle = _open(choose_device(wanted, webgpu), limits)
        features = _features(self.found)
        self.facts = DeviceFacts.of(self.found, features, self.handle.limits)
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
        return Recording(self.facts, owner, precision, body=body, plans=plans)

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

    def compile_all(self, kernels: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Compiles templates under their constants in several threads, for `pipeline` to find.

        Raises:
            GPUError: the driver refuses one.
        """
        with ThreadPoolExecutor(min(COMPILING_THREADS, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda kernel: self.pipeline(*kernel), kernels))

    def compile(self, label: str, code: str) -> Pipeline:
        """The pipeline of a kernel's WGSL text, whose entry point is `main`.

        With run-time checks where `Found.trusts_kernels` says so, and where LORA_CHECKED=1 was
        set in the environment when the device was opened.
        """
        return self.handle.compile(label, code)

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


def _features(found: Found) -> list[str]:
    """Those of use here that a device has."""
    return [feature for feature in _WANTED_FEATURES if feature in found.features]


def _open(choice: Choice, limits: Mapping[str, int] | None) -> tuple[Found, OpenDevice]:
    """Opens a chosen device, or what the choice has instead; which, and its handle."""
    found = choice.found
    asked = limits
    if asked is None:
        asked = {k: found.limits[k] for k in _WANTED_LIMITS if k in found.limits}
    checked = not found.trusts_kernels or os.environ.get(_CHECKED) == "1"
    try:
        return found, found.open(_features(found), asked, checked=checked)
    except GPUError as error:
        reason = str(error).splitlines()[0]
        name = f"{found.implementation.name} makes no device of {found.info['device']}"
        if choice.instead is None:
            raise InputError(f"{name} ({reason}); name another in `device`.") from error
        say_once(f"webgpu: auto: {name} ({reason}); wgpu-native is used.")
    return _open(Choice(choice.instead), limits)
