"""What recording must know of a device, as plain values."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora.shaders.webgpu import Found


def _host_memory() -> int | None:
    """Bytes of memory of this machine; None where the system doesn't tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


@dataclass(frozen=True)
class DeviceFacts:
    """What recording must know of a device.

    Attributes:
        name: as the driver gives it.
        info: WebGPU's description: adapter_type, backend_type, description, …
        is_cpu: a software driver.
        features: of WebGPU, those of use here.
        max_buffer, max_binding: bytes of one buffer, and of what a kernel may bind of it.
        workgroup_memory: bytes.
        most_lanes: of a workgroup.
        most_storage_buffers: that one kernel may bind.
        memory_limit: bytes of all buffers together; None where the device itself says when they
            are too many. A CPU device has the host's memory, and would be killed first.
    """

    name: str
    info: Mapping[str, Any]
    is_cpu: bool
    features: frozenset[str]
    max_buffer: int
    max_binding: int
    workgroup_memory: int
    most_lanes: int
    most_storage_buffers: int
    memory_limit: int | None = None

    @classmethod
    def of(cls, found: Found, features: Iterable[str], limits: Mapping[str, int]) -> DeviceFacts:
        """Of a device that was opened with these features and limits."""
        is_cpu = found.info["adapter_type"] == "CPU"
        return cls(
            name=found.info["device"],
            info=dict(found.info),
            is_cpu=is_cpu,
            features=frozenset(features),
            max_buffer=int(limits["max-buffer-size"]),
            max_binding=int(
                min(limits["max-storage-buffer-binding-size"], limits["max-buffer-size"])
            ),
            workgroup_memory=int(limits["max-compute-workgroup-storage-size"]),
            most_lanes=int(
                min(
                    limits["max-compute-invocations-per-workgroup"],
                    limits["max-compute-workgroup-size-x"],
                )
            ),
            most_storage_buffers=int(limits["max-storage-buffers-per-shader-stage"]),
            memory_limit=_host_memory() if is_cpu else None,
        )
