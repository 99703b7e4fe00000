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


MULTIPROCESSORS = 132  # of an H100 or H200, on which the model of a product's time was fitted

# By words of adapters' names, as the makers give them: streaming multiprocessors, compute units.
# The first that is in a name counts.
_MULTIPROCESSORS = {
    "H100 PCIe": 114, "H100": 132, "H200": 132, "A100": 108, "L40S": 142, "L4": 58, "Tesla T4": 40,
    "RTX 5090": 170, "RTX 4090": 128, "RTX 4080": 76, "RTX 3090": 82, "RTX 3080": 68,
    "RX 7900 XTX": 96,
}  # fmt: skip


def multiprocessors_of(name: str) -> int:
    """Of the device of that name; of an H100 for one that is not known."""
    return next((n for words, n in _MULTIPROCESSORS.items() if words in name), MULTIPROCESSORS)


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
        multiprocessors: between which workgroups are divided: WebGPU doesn't tell, a table of names
            does; that of the GPU that plans were fitted on for others.
        implementation, version: of WebGPU, and of the Python package that it comes in.
        subgroup_lanes: the fewest and the most of a subgroup; None where it is not known.
        distrusted: kinds of kernels on matrix units that were found wrong here
            (lora/checks/matrix_units.py).
        matrix_shapes: that its matrix units compute and our kernels can use, in the driver's order.
        device_memory: bytes of the GPU's own memory; None where the implementation doesn't tell.
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
    multiprocessors: int = MULTIPROCESSORS
    implementation: str = "wgpu-native"
    version: str = ""
    subgroup_lanes: tuple[int, int] | None = None
    matrix_shapes: tuple[MatrixShape, ...] = ()
    distrusted: frozenset[str] = frozenset()
    device_memory: int | None = None
    memory_limit: int | None = None

    @property
    def matrix_shape(self) -> MatrixShape | None:
        """The shape of fragments that our kernels take; None where there is none.

        Lanes of a subgroup must be known, since a workgroup is made of whole ones.
        """
        fixed = [shape for shape in self.matrix_shapes if shape.least_lanes == shape.most_lanes]
        return max(fixed, key=lambda shape: shape.m * shape.n * shape.k, default=None)

    @property
    def has_matrix_units(self) -> bool:
        """Whether it computes faster with them: software drivers have some, for tests."""
        return not self.is_cpu and self.matrix_shape is not None

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
            multiprocessors=multiprocessors_of(found.info["device"]),
            implementation=found.implementation.name,
            version=found.implementation.version,
            subgroup_lanes=found.subgroup_lanes,
            matrix_shapes=shapes,
            device_memory=found.device_memory,
            memory_limit=_host_memory() if is_cpu else None,
        )
