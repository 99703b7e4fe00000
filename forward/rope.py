"""Rotary position embedding (Su et al. 2021, "RoFormer")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora.forward.heads import Rotation
from lora.forward.plans.stretches import Stretches, scaled_columns, stretch_constants
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
    scales_columns = True

    def record(self, program: Program, product: Tensor, stretches: Stretches | None = None) -> None:
        """See `Follower`; the product is written in either case."""
        rope(
            program, product, self.rotation, self.n_rotated_heads, self.head_size, source=stretches
        )

    def adds_up(self, recording: Recording, width: int, splits: int) -> bool:
        """See `Follower`."""
        return turns_whole(self.rotation, self.head_size, width)


@dataclass(frozen=True)
class HeadSums:
    """Columns of k and v as a gradient leaves them: sums over query heads that share a key head.

    Attributes:
        partial: f32 [rows, 2 · n_heads · head_size], one for each query head, of k and then of v.
    """

    partial: Tensor
    n_heads: int
    n_kv_heads: int


def turns_whole(rotation: Rotation, head_size: int, width: int) -> bool:
    """Whether heads turn as a whole, by whole vectors: what is left of a row lies behind them."""
    return 2 * rotation.tables.shape[1] == head_size and width % 4 == head_size % 8 == 0


def rope(
    program: Program,
    qkv: Tensor,
    rotation: Rotation,
    n_rotated_heads: int,
    head_size: int,
    *,
    inverse: bool = False,
    source: Stretches | HeadSums | None = None,
) -> None:
    """Appends the rotation of the first heads of `qkv`, in place.

    Args:
        qkv: [rows, any width], f32 or f16: q heads, k heads, v heads.
        rotation: each row by its position in its example.
        n_rotated_heads: q and k heads together; what follows them is left alone.
        head_size: columns of a head; only its first rope_dimensions turn.
        inverse: turn back (the backward pass).
        source: where given, qkv is first their sum (scaled), or its columns of k and v are; of
            heads as `turns_whole` says.
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
    constants: dict[str, Any] = {
        "unit": unit,
        "qkv_type": qkv.dtype,
        "lanes": lanes,
        "half": half,
        "n_rotated_heads": n_rotated_heads,
        "head_size": head_size,
        "stride": qkv.shape[1],
        "interleaved": rotation.interleaved,
        "inverse": inverse,
        **_source_constants(source, qkv, n_rotated_heads, head_size),
    }
    tensors = [extent.uniform, qkv, positions, tables]
    units, label = half // unit * n_rotated_heads, "rope_backward" if inverse else "rope"
    scaled: list[Tensor] = []
    if isinstance(source, Stretches):
        scaled = scaled_columns("rope", source, *qkv.shape)
    constants["kept_type"] = scaled[-1].dtype if scaled else None
    if source is not None:
        if not turns_whole(rotation, head_size, qkv.shape[1]):
            raise ValueError(f"rope: heads of {head_size} with {half} pairs take no sums")
        units += (qkv.shape[1] - n_rotated_heads * head_size) // 4
        tensors, label = [*tensors, source.partial, *scaled], f"reduce_{label}"
    n_groups = -(-extent.maximum * units // lanes)
    program.dispatch("rope", constants, tensors, n_groups, label=label)


def _source_constants(
    source: Stretches | HeadSums | None, qkv: Tensor, n_rotated_heads: int, head_size: int
) -> dict[str, int]:
    """The template constants of what is turned: qkv itself, its stretches, or sums of heads."""
    rows, width = qkv.shape
    if not isinstance(source, HeadSums):
        found = stretch_constants("rope", source, rows, width, scales=True)
        return {**found, "n_heads": 0, "n_kv_heads": 0}
    n_heads, n_kv_heads = source.n_heads, source.n_kv_heads
    check_shape("rope sums", source.partial, rows, 2 * n_heads * head_size)
    fits = n_rotated_heads == n_heads + n_kv_heads and n_heads % n_kv_heads == 0
    if not fits or width != (n_heads + 2 * n_kv_heads) * head_size:
        raise ValueError(f"rope: sums of {n_heads} heads for {n_kv_heads} do not fit {qkv.shape}")
    return {"splits": 1, "maximum_rows": 0, "n_heads": n_heads, "n_kv_heads": n_kv_heads}
