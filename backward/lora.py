"""Gradients of the low-rank factors and of the projection z = x · Aᵀ.

y = x · Wᵀ + scale · z_g · B_gᵀ gives, for each member g and its columns of d_y:
d_z_g = scale · d_y_g · B_g,   d_B_g = scale · d_y_gᵀ · z_g,   d_A = d_zᵀ · x.
"""

from __future__ import annotations

from collections.abc import Sequence

from forward.activations import activation, check_shape, extent_of
from forward.adapter import LoraFactors
from forward.lora import as_part
from forward.matmul import record_product
from shaders.program import Program
from shaders.tensor import Tensor


def lora_project_gradient(
    program: Program, d_y: Tensor, lora: LoraFactors, *, out: Tensor | None = None
) -> Tensor:  # [rows, members · rank]
    """Appends d_z_g = scale · d_y_g · B_g, one dispatch a member.

    Args:
        d_y: [rows, out_features of the whole group].
        lora: B [sum of the members' out_features, rank].
        out: where to write; a new tensor by default.
    """
    extent = extent_of(d_y)
    d_z = out if out is not None else activation(program, extent, lora.n_members * lora.rank)
    check_shape("lora_project_gradient output", d_z, d_y.shape[0], lora.n_members * lora.rank)
    for index, (start, stop) in enumerate(lora.ranges):
        record_product(
            program,
            extent,
            d_y,
            as_part(lora.b),
            d_z,
            transposed=True,
            contraction=stop - start,
            first_weight_row=lora.first_row(index),
            x_column=start,
            n_columns=lora.rank,
            out_column=index * lora.rank,
            out_scale=lora.scale,
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
    _add_outer(program, d_z, 0, x, 0, [g.a for g in gradients], 0, d_z.shape[1], 1.0, "d_A")
    for index, (start, stop) in enumerate(lora.ranges):
        _add_outer(
            program,
            d_y,
            start,
            z,
            index * lora.rank,
            [g.b for g in gradients],
            lora.first_row(index),
            stop - start,
            lora.scale,
            "d_B",
        )


def _add_outer(
    program: Program,
    left: Tensor,
    left_column: int,
    right: Tensor,
    right_column: int,
    slices: Sequence[Tensor],
    first_row: int,
    n_left: int,
    scale: float,
    label: str,
) -> None:
    extent = extent_of(left)
    n_right = slices[0].shape[1]
    if n_left % 4 or n_right % 4:
        raise ValueError(f"{label}: [{n_left}, {n_right}] must be multiples of 4")
    # A CPU adapter pays for loads: larger blocks a lane. A GPU wants many lanes.
    side = 8 if program.device.is_cpu else 4
    lane_left, lane_right = min(side, n_left), min(side, n_right)
    if n_left % lane_left or n_right % lane_right:
        lane_left, lane_right = 4, 4
    constants = {
        "n_slices": len(slices),
        "n_left": n_left,
        "n_right": n_right,
        "left_stride": left.shape[1],
        "right_stride": right.shape[1],
        "left_column": left_column,
        "right_column": right_column,
        "first_row": first_row,
        "scale": scale,
        "lane_left": lane_left,
        "lane_right": lane_right,
    }
    lanes = -(-n_left // lane_left) * -(-n_right // lane_right)
    program.dispatch(
        "lora_gradient",
        constants,
        [extent.uniform, left, right, *slices],
        (-(-lanes // 64), 1, len(slices)),
        label=label,
        flops=2 * extent.maximum * n_left * n_right,
    )
