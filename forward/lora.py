"""The low-rank projection z = x · Aᵀ (Hu et al. 2021, "LoRA")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from lora.forward.dropout import GroupDropout
from lora.forward.lora_matrix import projection_cut
from lora.forward.model.factors import LoraFactors
from lora.shaders.activations import activation, check_f32, check_shape, extent_of
from lora.shaders.program import Planned, Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor


@dataclass(frozen=True)
class Tuning:
    """How a GPU divides a projection.

    A row's sums must not depend on how many rows there are: only the block follows from that.
    """

    # Rows of a lane; lanes that differ in their rows; lanes side by side, at most, of four columns
    # each, that read the same of x; steps of the contraction that a lane loads at once, a power of
    # two. The first block that makes enough workgroups is taken, else the last: large ones read
    # less, many workgroups wait for memory together.
    blocks: tuple[tuple[int, int, int, int], ...]
    enough_groups: int
    splits: int  # lanes that share a contraction


# For z and, transposed, for d_z: measured inside a step, where x is not in a multiprocessor's cache
# yet as it is when one kernel is repeated.
GPU_TUNINGS = {
    False: Tuning(
        ((4, 2, 2, 4), (2, 2, 2, 4), (1, 2, 2, 4), (1, 1, 1, 8)), enough_groups=264, splits=64
    ),
    True: Tuning(((4, 1, 2, 8), (2, 1, 2, 8), (1, 1, 1, 8)), enough_groups=264, splits=64),
}
# A CPU device runs a workgroup as vectors of 8 lanes and pays for loads and barriers.
CPU_SPLITS, CPU_ROWS = 8, 12
_GROUP_LANES = 256  # that every device can run in a workgroup


@dataclass(frozen=True)
class Projection:
    """What one member's columns of a projection are summed over; see lora_project.wgsl."""

    x_column: int  # first column of x
    factor_row: int  # first row of the factor
    length: int  # of the contraction
    scale: float = 1.0  # of its columns of z


@dataclass(frozen=True)
class Block:
    """How a workgroup's lanes divide its rows, columns and contraction; see lora_project.wgsl."""

    splits: int  # lanes that share the contraction
    column_lanes: int
    row_lanes: int
    lane_rows: int
    lane_columns: int
    unroll: int

    @property
    def lanes(self) -> int:
        """Of the workgroup."""
        return self.splits * self.column_lanes * self.row_lanes

    @property
    def sum_bytes(self) -> int:
        """Of workgroup memory, for all lanes' sums."""
        return 4 * self.lanes * self.lane_rows * self.lane_columns

    def n_groups(self, rows: int, width: int) -> int:
        """Workgroups for z [rows, width]."""
        block_columns = self.lane_columns * self.column_lanes
        return -(-rows // (self.lane_rows * self.row_lanes)) * (width // block_columns)


def lora_project(
    program: Program,
    x: Tensor,
    lora: LoraFactors,
    *,
    out: Tensor | None = None,
    dropout: GroupDropout | None = None,
    label: str = "lora_project",
) -> Tensor:  # [rows, members · rank]
    """Appends z = x · Aᵀ for all members that share x in one dispatch.

    Args:
        x: [rows, in_features], f32 or f16.
        lora: A [members · rank, in_features].
        out: where to write; a new tensor by default.
        dropout: of x, for each member; None for none.
    """
    width, in_features = lora.a.shape
    check_shape("lora_project input", x, None, in_features)
    check_shape("lora_project factor", lora.a, lora.n_members * lora.rank, in_features)
    z = out if out is not None else activation(program, extent_of(x), width)
    members = [Projection(0, 0, in_features)]
    if lora.member_scales or dropout is not None:
        members = [
            Projection(0, member * lora.rank, in_features, lora.projection_scale(member))
            for member in range(lora.n_members)
        ]
    operands = Operands(x, lora.a, z, dropout)
    plan_projection(program.recording, operands, members, transposed=False, label=label).append(
        program
    )
    return z


@dataclass(frozen=True)
class Operands:
    """What a projection reads and writes.

    Attributes:
        x: [rows, any], f32 or f16.
        factor: F itself, or transposed.
        z: [rows, members · columns], every member as many columns as another.
        dropout: of x, for each member; None for none.
        largest: u32 [rows], bits of the largest numbers of rows of an f32 x, for tiles of f16.
        halves: f16 as x, which has them scaled (`SizedRows.halves`), for matrix units; or None.
        scales: f32 [columns of x], what rows of a transposed factor are multiplied by, on matrix
            units; None for ones.
    """

    x: Tensor
    factor: Tensor
    z: Tensor
    dropout: GroupDropout | None = None
    largest: Tensor | None = None
    halves: Tensor | None = None
    scales: Tensor | None = None


def plan_projection(
    recording: Recording,
    operands: Operands,
    members: Sequence[Projection],
    *,
    transposed: bool,
    scale: float = 1.0,
    label: str,
) -> Planned:
    """z_g = scale · scale_g · x_g · F_gᵀ, in one dispatch.

    What `lora_project` and its backward share.

    Args:
        members: where each one's part of x and of the factor lies.
        transposed: whether the factor is Fᵀ.
    """
    x, factor, z, dropout = operands.x, operands.factor, operands.z, operands.dropout
    others = [tensor for tensor in (operands.largest, operands.scales) if tensor is not None]
    extent = extent_of(x)
    if dropout is not None:
        check_shape(f"{label} keys", dropout.rows, x.shape[0])
        scale *= dropout.scale
    check_shape(f"{label} output", z, x.shape[0], None)
    check_f32(label, factor=factor, z=z, scales=operands.scales)
    if operands.scales is not None:
        check_shape(f"{label} scales", operands.scales, x.shape[1])
    columns = z.shape[1] // len(members)
    widths = [x.shape[1], factor.shape[1], columns]
    widths += [n for m in members for n in (m.x_column, m.length)]
    if any(n % 4 for n in widths) or columns * len(members) != z.shape[1]:
        raise ValueError(f"{label}: widths must be multiples of 4: {x.shape}, {z.shape}, {members}")
    rows, n_members = extent.maximum, len(members)
    cut = projection_cut(recording, rows, columns, n_members, transposed=transposed)
    if cut is not None and operands.halves is not None:
        check_shape(f"{label} halves", operands.halves, *x.shape)
        x = operands.halves
    shared = {
        "transposed": transposed,
        "members": [{**asdict(m), "scale": scale * m.scale} for m in members],
        "columns": columns,
        "x_type": x.dtype,
        "x_stride": x.shape[1],
        "factor_stride": factor.shape[1],
        "dropout": None if dropout is None else dropout.constants,
    }
    flops = 2 * rows * columns * sum(m.length for m in members)
    keys = [] if dropout is None else [dropout.rows, dropout.matrices]
    if cut is not None:
        pieces = columns // cut["columns"]  # which the kernel takes for members
        cut["members"] = [
            {
                **asdict(m),
                "factor_row": m.factor_row + piece * cut["columns"],
                "scale": scale * m.scale,
            }
            for m in members
            for piece in range(pieces)
        ]
        ends = [x.shape[1], *(n for m in members for n in (m.x_column, m.length))]
        by_eights = x.dtype == "f16" and not any(n % 8 for n in ends)
        return Planned(
            "lora_project_matrix",
            {
                **shared,
                **cut,
                "x_by_eights": by_eights,
                "pieces": pieces,
                "x_scaled": operands.largest is not None,
                "factor_scaled": operands.scales is not None,
            },
            [extent.uniform, x, factor, z, *others, *keys],
            -(-rows // cut["block_rows"]) * n_members * pieces,
            label,
            flops,
        )
    if operands.scales is not None:
        raise ValueError(f"{label}: rows of the factor are scaled on matrix units only")
    if recording.facts.is_cpu:
        block = Block(CPU_SPLITS, 1, 1, CPU_ROWS, 8 if columns % 8 == 0 else 4, 1)
    else:
        tuning = GPU_TUNINGS[transposed]
        block = gpu_block(recording, tuning, rows, columns, n_members)
    return Planned(
        "lora_project",
        {**shared, **asdict(block)},
        [extent.uniform, x, factor, z, *keys],
        block.n_groups(rows, z.shape[1]),
        label,
        flops,
    )


def gpu_block(
    recording: Recording, tuning: Tuning, rows: int, columns: int, n_members: int
) -> Block:
    """The first of a tuning's blocks that makes enough workgroups, of those that one can hold."""
    quads = columns // 4
    fitting = []
    for lane_rows, row_lanes, most_column_lanes, unroll in tuning.blocks:
        column_lanes = max(n for n in range(1, most_column_lanes + 1) if quads % n == 0)
        block = Block(tuning.splits, column_lanes, row_lanes, lane_rows, 4, unroll)
        if block.lanes <= _GROUP_LANES and block.sum_bytes <= recording.facts.workgroup_memory:
            if block.n_groups(rows, n_members * columns) >= tuning.enough_groups:
                return block
            fitting.append(block)
    return fitting[-1]
