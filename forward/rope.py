"""Rotary position embedding (Su et al. 2021, "RoFormer")."""

from __future__ import annotations

from dataclasses import dataclass

from lora.forward.heads import Rotation
from lora.forward.plans.stretches import Stretches, stretch_constants
from lora.shaders.activations import check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

GPU_LANES, CPU_LANES = 64, 64  # of a workgroup


@dataclass(frozen=True)
class RopeAfter:
    """The rotation of a product; attributes as the arguments of `rope`."""

    rotation: Rotation
    n_rotated_heads: int
    head_size: int

    def record(self, program: Program, product: Tensor, stretches: Stretches | None = None) -> None:
        """See `Follower`; the product is written in either case."""
        rope(
            program, product, self.rotation, self.n_rotated_heads, self.head_size,
            stretches=stretches,
        )  # fmt: skip

    def adds_up(self, recording: Recording, width: int, splits: int) -> bool:
        """See `Follower`: where heads turn whole, by whole vectors, columns left over follow."""
        return 2 * self.rotation.tables.shape[1] == self.head_size and width % 4 == 0 == (
            self.head_size % 8
        )


def rope(
    program: Program,
    qkv: Tensor,
    rotation: Rotation,
    n_rotated_heads: int,
    head_size: int,
    *,
    inverse: bool = False,
    stretches: Stretches | None = None,
) -> None:
    """Appends the rotation of the first heads of `qkv`, in place.

    Args:
        qkv: [rows, any width], f32 or f16: q heads, k heads, v heads.
        rotation: each row by its position in its example.
        n_rotated_heads: q and k heads together; what follows them is left alone.
        head_size: columns of a head; only its first rope_dimensions turn.
        inverse: turn back (the backward pass).
        stretches: where given, qkv is their sum before it is turned; as `RopeAfter.adds_up` says.
    """
    extent, positions, tables = extent_of(qkv), rotation.positions, rotation.tables
    check_shape("rope positions", positions, qkv.shape[0])
    check_shape("rope tables", tables, None, None, 2)
    half = tables.shape[1]
    if 2 * half > head_size or n_rotated_heads * head_size > qkv.shape[1]:
        raise ValueError(
            f"rope: {n_rotated_heads} heads of {head_size} with {2 * half} rotated columns "
            f"do not fit {qkv.shape}"
        )
    # Four pairs a lane as whole vectors, where heads and their rotated halves are made of these.
    unit = 4 if half % 4 == head_size % 4 == qkv.shape[1] % 4 == 0 else 1
    lanes = CPU_LANES if program.recording.facts.is_cpu else GPU_LANES
    constants = {
        "unit": unit,
        "qkv_type": qkv.dtype,
        "lanes": lanes,
        "half": half,
        "n_rotated_heads": n_rotated_heads,
        "head_size": head_size,
        "stride": qkv.shape[1],
        "interleaved": rotation.interleaved,
        "inverse": inverse,
        **stretch_constants("rope", stretches, extent.maximum, qkv.shape[1]),
    }
    tensors = [extent.uniform, qkv, positions, tables]
    units, label = half // unit * n_rotated_heads, "rope_backward" if inverse else "rope"
    if stretches is not None:
        after = RopeAfter(rotation, n_rotated_heads, head_size)
        if not after.adds_up(program.recording, qkv.shape[1], stretches.splits):
            raise ValueError(f"rope: heads of {head_size} with {half} pairs take no stretches")
        units += (qkv.shape[1] - n_rotated_heads * head_size) // 4
        tensors, label = [*tensors, stretches.partial], f"reduce_{label}"
    n_groups = -(-extent.maximum * units // lanes)
    program.dispatch("rope", constants, tensors, n_groups, label=label)
