"""What is asked of a WebGPU implementation: the seam behind which wgpu-native and Dawn stand.

shaders/native.py is wgpu-native, shaders/dawn.py is Dawn, and shaders/python_api.py is what their
packages have in common. Nothing else imports an implementation or knows its inner functions.

Pipelines, bind groups, query sets and encoded commands are whatever the implementation makes them:
they are only handed back to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np

Pipeline = Any
BindGroup = Any
QuerySet = Any
Commands = Any
Launch = tuple[Pipeline, BindGroup, tuple[int, int, int]]  # the last the grid of workgroups
UNIFORM = 0x40  # of a buffer's flags
Stamps = tuple[QuerySet, int, int]  # which queries take the times before and after a pass
MATRIX_FEATURE = "chromium-experimental-subgroup-matrix"  # Dawn's name; WebGPU has none yet


@dataclass(frozen=True, order=True)
class MatrixShape:
    """A product that a GPU's matrix units compute: [m, k] · [k, n] added to [m, n].

    Attributes:
        m, n, k: rows of the result, its columns, and the length of the sums.
        inputs: type of both factors, as WGSL names it (f16, f32, i8, u8).
        result: type of the sums (f16, f32, i32, u32).
        least_lanes, most_lanes: of the subgroups that compute it together.
    """

    m: int
    n: int
    k: int
    inputs: str
    result: str
    least_lanes: int
    most_lanes: int

    def __str__(self) -> str:
        return f"{self.inputs}→{self.result} {self.m}×{self.n}×{self.k}"


class Use(Enum):
    """What a buffer is for."""

    STORAGE = "kernels read and write it"
    UNIFORM = "kernels read it as a uniform"
    RESULT = "it is copied into and then mapped for the host"
    SOURCE = "the host maps and writes it, and it is copied from"


class Buffer(Protocol):
    """Memory on the device."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def usage(self) -> int:
        """WebGPU's flags."""

    def destroy(self) -> None:
        """Gives the memory back; work that was submitted before still finds it."""


class Mapped(Protocol):
    """A buffer on its way to the host."""

    def arrived(self) -> bool:
        """Whether it can be read; only `OpenDevice.poll` makes that so."""

    def take(self) -> bytes:
        """Its bytes, once it has arrived; the buffer may be copied into again."""

    def read_into(self, target: np.ndarray) -> None:
        """As `take`, into u8 [size] that are there."""


class MappedSource(Protocol):
    """A buffer that the host is about to write."""

    def arrived(self) -> bool:
        """Whether it can be written; only `OpenDevice.poll` makes that so."""

    def write(self, data: np.ndarray) -> None:
        """Copies u8 [size] into it, once it has arrived; then it may be copied from."""


class Encoder(Protocol):
    """Takes commands in their order."""

    def dispatches(self, launches: Iterable[Launch], stamps: Stamps | None = None) -> None:
        """One pass of kernel launches, with a timestamp before and after it where asked for."""

    def copy(
        self, source: Buffer, source_offset: int, target: Buffer, offset: int, n_bytes: int
    ) -> None:
        """A copy between two buffers."""

    def clear(self, buffer: Buffer, offset: int, n_bytes: int) -> None:
        """A fill with zeros."""

    def finish(self) -> Commands:
        """What `OpenDevice.submit` takes.

        Raises:
            GPUError: some command was not valid.
        """


class OpenDevice(Protocol):
    """A device with its queue."""

    @property
    def limits(self) -> Mapping[str, int]:
        """WebGPU's limits, by their names with hyphens."""

    def create_buffer(self, n_bytes: int, use: Use) -> Buffer:
        """A buffer of zeros.

        Raises:
            GPUError: the device has no room.
        """

    def write(self, buffer: Buffer, offset: int, data: Any) -> None:
        """Copies host bytes (a contiguous array) into a buffer, before what is submitted next."""

    def release_staging(self) -> None:
        """Gives back the host's memory of the writes so far."""

    def read(self, buffer: Buffer, offset: int, n_bytes: int) -> memoryview:
        """Waits for all that was submitted, and copies bytes to the host."""

    def map_for_reading(self, buffer: Buffer) -> Mapped:
        """Asks for a buffer of `Use.RESULT` without waiting for it."""

    def map_for_writing(self, buffer: Buffer) -> MappedSource:
        """Asks for a buffer of `Use.SOURCE` without waiting for copies from it that are under way.

        Unlike `write` it takes no new memory of the driver's for each of many megabytes.
        """

    def poll(self) -> None:
        """Finds out what has ended, without waiting."""

    def compile(self, label: str, code: str) -> Pipeline:
        """The pipeline of a kernel's WGSL text, whose entry point is `main`.

        Raises:
            GPUError: the code is wrong.
        """

    def bind_group(
        self, pipeline: Pipeline, ranges: Sequence[tuple[Buffer, int, int]]
    ) -> BindGroup:
        """Binds ranges (buffer, offset, bytes) to @group(0), in the order of their @binding."""

    def query_set(self, count: int) -> QuerySet:
        """Room for timestamps."""

    def encoder(self) -> Encoder:
        """A new one."""

    def submit(self, commands: Commands) -> None:
        """Hands commands to the device; does not wait."""

    def submit_timed(self, encoder: Encoder, queries: QuerySet, count: int) -> list[int]:
        """Submits an encoder's commands and waits for their first `count` timestamps, in ns."""

    def close(self) -> None:
        """Gives everything back."""


class Found(Protocol):
    """A device that can be opened. WebGPU calls it an adapter; here that word means LoRA's."""

    @property
    def info(self) -> Mapping[str, Any]:
        """WebGPU's description: device, adapter_type, backend_type, description, …"""

    @property
    def features(self) -> frozenset[str]:
        """WebGPU's features, by their names with hyphens, whatever the implementation's are."""

    @property
    def limits(self) -> Mapping[str, int]:
        """The most that can be asked for."""

    @property
    def implementation(self) -> Implementation:
        """Whose it is."""

    @property
    def subgroup_lanes(self) -> tuple[int, int] | None:
        """The fewest and the most lanes of a subgroup; None where the implementation can't tell."""

    @property
    def matrix_shapes(self) -> tuple[MatrixShape, ...]:
        """What its matrix units compute, in the driver's order; empty where none can be reached."""

    @property
    def device_memory(self) -> int | None:
        """Bytes of the GPU's own memory; None where the implementation can't tell."""

    @property
    def trusts_kernels(self) -> bool:
        """Whether our kernels run without the implementation's own checks, which cost a tenth.

        Where the driver keeps every access inside its buffer all the same, or where these kernels
        have been tested with the checks on; not on Metal, which nobody here has.
        """

    def open(
        self, features: Iterable[str], limits: Mapping[str, int], *, checked: bool
    ) -> OpenDevice:
        """Opens it with these features and limits.

        Args:
            checked: kernels are compiled with the implementation's own checks of indices and loops.

        Raises:
            GPUError: the driver makes no such device.
        """


class Implementation(Protocol):
    """One implementation of WebGPU."""

    @property
    def name(self) -> str:
        """As reports call it."""

    @property
    def setting(self) -> str:
        """As the config's `webgpu:` calls it."""

    @property
    def package(self) -> str:
        """The Python package that it comes in."""

    @property
    def version(self) -> str:
        """Of that package, which holds one version of the implementation."""

    @property
    def library_version(self) -> str:
        """Of the implementation itself."""

    def found(self) -> list[Found]:
        """The devices of this machine, in its order."""
