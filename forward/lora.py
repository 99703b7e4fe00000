"""The low-rank projection z = x · Aᵀ (Hu et al. 2021, "LoRA")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from forward.activations import activation, check_shape, extent_of
from forward.adapter import LoraFactors
from shaders.program import Program
from shaders.tensor import Tensor

# Blocks of rows × columns that a workgroup of a GPU makes: the first that gives GPU_WORKGROUPS of
# them. Large blocks read less, many workgroups wait for memory together.
GPU_BLOCKS = ((8, 8), (4, 8), (2, 8), (8, 4), (4, 4), (2, 4))
GPU_WORKGROUPS = 512
# Lanes that share a contraction of up to GPU_LONG, and a longer one (so that a row's sums do not
# depend on how many rows there are); steps of it that a lane loads at once.
GPU_LANES, GPU_LONG_LANES, GPU_LONG, GPU_UNROLL = 64, 128, 1024, 4
# A CPU adapter runs a workgroup as vectors of 8 lanes and pays for loads and barriers.
CPU_LANES, CPU_ROWS = 8, 12
_WORKGROUP_FLOATS = 4096  # 16 KiB of workgroup memory, which every device has


@dataclass(frozen=True)
class Projection:
    """What one member's columns of a projection are summed over; see lora_project.wgsl."""

    x_column: int  # first column of x
    factor_row: int  # first row of the factor
    length: int  # of the contraction


def lora_project(
    program: Program,
    x: Tensor,
    lora: LoraFactors,
    *,
    out: Tensor | None = None,
    label: str = "lora_project",
) -> Tensor:  # [rows, members · rank]
    """Appends z = x · Aᵀ for all members that share x in one dispatch.

    Args:
        x: [rows, in_features].
        lora: A [members · rank, in_features].
        out: where to write; a new tensor by default.
    """
    width, in_features = lora.a.shape
    check_shape("lora_project input", x, None, in_features)
    check_shape("lora_project factor", lora.a, lora.n_members * lora.rank, in_features)
    z = out if out is not None else activation(program, extent_of(x), width)
    record_projection(
        program, x, lora.a, z, [Projection(0, 0, in_features)], transposed=False, label=label
    )
    return z


def record_projection(
    program: Program,
    x: Tensor,
    factor: Tensor,
    z: Tensor,
    members: Sequence[Projection],
    *,
    transposed: bool,
    scale: float = 1.0,
    label: str,
) -> None:
    """Appends z_g = scale · x_g · F_gᵀ in one dispatch: what `lora_project` and its backward share.

    Args:
        x: [rows, any].
        factor: F itself, or with `transposed` Fᵀ.
        z: [rows, members · columns], every member as many columns as another.
        members: where each one's part of x and of the factor lies.
    """
    extent = extent_of(x)
    check_shape(f"{label} output", z, x.shape[0], None)
    columns = z.shape[1] // len(members)
    widths = [x.shape[1], factor.shape[1], columns]
    widths += [n for m in members for n in (m.x_column, m.length)]
    if any(n % 4 for n in widths) or columns * len(members) != z.shape[1]:
        raise ValueError(f"{label}: widths must be multiples of 4: {x.shape}, {z.shape}, {members}")
    if program.device.is_cpu:
        lanes, block_rows, unroll = CPU_LANES, CPU_ROWS, 1
        block_columns = 8 if columns % 8 == 0 else 4
    else:
        longest = max(m.length for m in members)
        lanes, unroll = GPU_LANES if longest <= GPU_LONG else GPU_LONG_LANES, GPU_UNROLL
        block_rows, block_columns = _gpu_block(extent.maximum, columns, len(members), lanes)
    constants = {
        "transposed": transposed,
        "members": [asdict(m) for m in members],
        "columns": columns,
        "x_stride": x.shape[1],
        "factor_stride": factor.shape[1],
        "scale": scale,
        "lanes": lanes,
        "block_rows": block_rows,
        "block_columns": block_columns,
        "unroll": unroll,
    }
    program.dispatch(
        "lora_project",
        constants,
        [extent.uniform, x, factor, z],
        -(-extent.maximum // block_rows) * (z.shape[1] // block_columns),
        label=label,
        flops=2 * extent.maximum * columns * sum(m.length for m in members),
    )


def _gpu_block(rows: int, columns: int, n_members: int, lanes: int) -> tuple[int, int]:
    """Rows × columns of one workgroup's block, of those whose sums fit into workgroup memory."""
    fitting = [
        (r, c) for r, c in GPU_BLOCKS if columns % c == 0 and lanes * r * c <= _WORKGROUP_FLOATS
    ]
    for r, c in fitting:
        if -(-rows // r) * n_members * (columns // c) >= GPU_WORKGROUPS:
            return r, c
    return fitting[-1]
