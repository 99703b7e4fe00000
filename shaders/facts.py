"""What recording must know of a device, as plain values."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora.shaders.webgpu import MATRIX_FEATURE, Found, MatrixShape


def _host_memory() -> int | None:
    """Bytes of memory of this machine; None where the system doesn't tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def usable_shapes(shapes: Iterable[MatrixShape]) -> tuple[MatrixShape, ...]:
    """Of the shapes of matrix units those that our kernels can use: f16 factors, f32 sums.

    Sums in f16 would lose what f32 tiles keep, and weights of whole numbers don't meet activations
    that are.
    """
    return tuple(shape for shape in shapes if (shape.inputs, shape.result) == ("f16", "f32"))


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
        implementation, version: of WebGPU, and of the Python package that it comes in.
        subgroup_lanes: the fewest and the most of a subgroup; None where it is not known.
        matrix_shapes: that its matrix units compute and our kernels can use, in the driver's order.
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
    implementation: str = "wgpu-native"
    version: str = ""
    subgroup_lanes: tuple[int, int] | None = None
    matrix_shapes: tuple[MatrixShape, ...] = ()
    memory_limit: int | None = None

    @property
    def software(self) -> str:
        """The implementation and the version of its package, as reports name them."""
        return f"{self.implementation} {self.version}"

    @classmethod
    def of(cls, found: Found, features: Iterable[str], limits: Mapping[str, int]) -> DeviceFacts:
        """Of a device that was opened with these features and limits."""
        is_cpu = found.info["adapter_type"] == "CPU"
        enabled = frozenset(features)
        shapes = usable_shapes(found.matrix_shapes) if MATRIX_FEATURE in enabled else ()
        return cls(
            name=found.info["device"],
            info=dict(found.info),
            is_cpu=is_cpu,
            features=enabled,
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
            implementation=found.implementation.name,
            version=found.implementation.version,
            subgroup_lanes=found.subgroup_lanes,
            matrix_shapes=shapes,
            memory_limit=_host_memory() if is_cpu else None,
        )
