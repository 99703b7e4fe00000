"""Allocation and shape checks that the kernels' wrappers share."""

from __future__ import annotations

from lora.shaders.program import Program
from lora.shaders.tensor import Extent, Tensor


def activation(program: Program, extent: Extent, *shape: int) -> Tensor:
    """A new f32 tensor [extent.maximum, *shape] whose rows in use are `extent`'s."""
    return program.recording.memory.empty((extent.maximum, *shape), extent=extent)


def extent_of(x: Tensor) -> Extent:
    """The extent of an activation; a tensor without one is a programming error."""
    if x.extent is None:
        raise ValueError(f"a tensor of shape {x.shape} has no extent: it is not an activation")
    return x.extent


def check_shape(name: str, x: Tensor, *shape: int | None) -> None:
    """Refuses a tensor of another shape where the program is recorded (None: any size)."""
    fits = len(x.shape) == len(shape) and all(
        wanted is None or wanted == size for wanted, size in zip(shape, x.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {x.shape}, expected {shape}")


def check_f32(kernel: str, **tensors: Tensor | None) -> None:
    """Refuses tensors that a kernel declares as f32 and that are of another type."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != "f32":
            raise ValueError(f"{kernel}: {name} is {tensor.dtype}, expected f32")
