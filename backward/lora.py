"""Gradients of the low-rank factors and of the projection z = x · Aᵀ.

y = x · Wᵀ + scale · z_g · B_gᵀ gives, for each member g and its columns of d_y:
d_z_g = scale · d_y_g · B_g,   d_B_g = scale · d_y_gᵀ · z_g,   d_A = d_zᵀ · x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from forward.activations import activation, check_shape, extent_of
from forward.adapter import LoraFactors
from forward.lora import Projection, record_projection
from shaders.program import Program
from shaders.tensor import Tensor

MAX_SLICES = 4  # with the two inputs, six of the eight storage buffers that every device binds
_SPLITS = 8  # lanes of a GPU that share the rows of one block


@dataclass(frozen=True)
class _Member:
    """Rows of a gradient from `first` on; see lora_gradient.wgsl."""

    first: int
    shift: int  # left's column is the gradient's row plus this
    right_column: int


def lora_project_gradient(
    program: Program, d_y: Tensor, lora: LoraFactors, *, out: Tensor | None = None
) -> Tensor:  # [rows, members · rank]
    """Appends d_z_g = scale · d_y_g · B_g for all members in one dispatch.

    Args:
        d_y: [rows, out_features of the whole group].
        lora: B [sum of the members' out_features, rank].
        out: where to write; a new tensor by default.
    """
    _check_factors(lora)
    _check_output_columns(d_y, lora)
    width = lora.n_members * lora.rank
    d_z = out if out is not None else activation(program, extent_of(d_y), width)
    check_shape("lora_project_gradient output", d_z, d_y.shape[0], width)
    members = [
        Projection(start, lora.first_row(index), stop - start)
        for index, (start, stop) in enumerate(lora.ranges)
    ]
    record_projection(
        program,
        d_y,
        lora.b,
        d_z,
        members,
        transposed=True,
        scale=lora.scale,
        label="lora_project_gradient",
    )
    return d_z


def lora_gradients(
    program: Program,
    x: Tensor,
    z: Tensor,
    d_y: Tensor,
    d_z: Tensor,
    lora: LoraFactors,
    gradients: Sequence[LoraFactors],
) -> None:
    """Appends d_A += d_zᵀ · x and d_B_g += scale · d_y_gᵀ · z_g.

    Args:
        x: [rows, in_features].
        z: [rows, members · rank] = x · Aᵀ.
        d_y: [rows, out_features of the whole group].
        d_z: [rows, members · rank] from `lora_project_gradient`.
        lora: the factors.
        gradients: their gradients, one of each slice (one to four): stretch s of the rows is
            added to slice s.
    """
    _check_factors(lora)
    _check_output_columns(d_y, lora)
    check_shape("lora_gradients x", x, d_y.shape[0], lora.a.shape[1])
    for name, tensor in (("z", z), ("d_z", d_z)):
        check_shape(f"lora_gradients {name}", tensor, d_y.shape[0], lora.n_members * lora.rank)
    if not 1 <= len(gradients) <= MAX_SLICES:
        raise ValueError(f"lora_gradients: {len(gradients)} slices, expected 1 to {MAX_SLICES}")
    for gradient in gradients:
        check_shape("gradient of A", gradient.a, *lora.a.shape)
        check_shape("gradient of B", gradient.b, *lora.b.shape)
    # d_z carries the scale already.
    _add_outer(program, d_z, x, [g.a for g in gradients], [_Member(0, 0, 0)], 1.0, "d_A")
    members = [
        _Member(lora.first_row(index), start - lora.first_row(index), index * lora.rank)
        for index, (start, _) in enumerate(lora.ranges)
    ]
    _add_outer(program, d_y, z, [g.b for g in gradients], members, lora.scale, "d_B")


def _check_factors(lora: LoraFactors) -> None:
    check_shape("A", lora.a, lora.n_members * lora.rank, None)
    check_shape("B", lora.b, sum(stop - start for start, stop in lora.ranges), lora.rank)


def _check_output_columns(d_y: Tensor, lora: LoraFactors) -> None:
    if len(d_y.shape) != 2 or d_y.shape[1] < lora.ranges[-1][1]:
        raise ValueError(f"d_y of shape {d_y.shape} lacks columns of {lora.ranges}")


def _add_outer(
    program: Program,
    left: Tensor,
    right: Tensor,
    slices: Sequence[Tensor],
    members: Sequence[_Member],
    scale: float,
    label: str,
) -> None:
    extent = extent_of(left)
    n_left, n_right = slices[0].shape
    boundaries = [n for m in members for n in (m.first, m.first + m.shift)]
    widths = [n_left, n_right, left.shape[1], right.shape[1], *boundaries]
    if any(n % 4 for n in widths):
        raise ValueError(f"{label}: widths must be multiples of 4: {widths}")
    # Blocks must not straddle two members. The short side is the rank's: a GPU keeps the long side
    # of a block at 4, for more lanes; a CPU adapter pays for loads and takes 8 × 8.
    is_cpu = program.device.is_cpu
    lane_left = 8 if all(n % 8 == 0 for n in [n_left, *boundaries]) else 4
    lane_right = 8 if n_right % 8 == 0 else 4
    if not is_cpu and n_left > n_right:
        lane_left = 4
    elif not is_cpu:
        lane_right = 4
    splits = 1 if is_cpu else _SPLITS
    constants = {
        "n_slices": len(slices),
        "n_left": n_left,
        "n_right": n_right,
        "left_stride": left.shape[1],
        "right_stride": right.shape[1],
        "members": [asdict(m) for m in members],
        "scale": scale,
        "lane_left": lane_left,
        "lane_right": lane_right,
        "splits": splits,
    }
    n_blocks = (n_left // lane_left) * (n_right // lane_right)
    program.dispatch(
        "lora_gradient",
        constants,
        [extent.uniform, left, right, *slices],
        (-(-n_blocks * splits // 64), 1, len(slices)),
        label=label,
        flops=2 * extent.maximum * n_left * n_right,
    )
