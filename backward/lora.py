"""Gradients of the low-rank factors and of the projection z = x · Aᵀ.

y = x · Wᵀ + scale · z_g · B_gᵀ gives, for each member g and its columns of d_y:
d_z_g = scale · d_y_g · B_g,   d_B_g = scale · d_y_gᵀ · z_g,   d_A = d_zᵀ · x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lora.forward.dropout import GroupDropout
from lora.forward.lora import Operands, Projection, plan_projection
from lora.forward.lora_matrix import gradient_cut, projection_cut
from lora.forward.model.factors import LoraFactors
from lora.forward.part_product import SizedRows
from lora.shaders.activations import activation, check_f32, check_shape, extent_of
from lora.shaders.facts import DeviceFacts
from lora.shaders.program import Planned, Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

# With the four inputs the eight storage buffers that every device binds.
MAX_SLICES = 4
# Of the kernels that take columns as DoRA scales them: with the product, its scales and lengths.
SCALED_BUFFERS = 12


def most_slices(facts: DeviceFacts, dropout: bool) -> int:
    """Slices of the gradients that a device can bind: with dropout, whose keys are one more."""
    return MAX_SLICES - (dropout and facts.most_storage_buffers <= 2 * MAX_SLICES)


@dataclass(frozen=True)
class Tuning:
    """How `lora_gradients` is divided."""

    blocks: int  # of the gradients' elements, in a workgroup
    short_lanes: int  # of them side by side along a gradient's shorter side, at most
    splits: int  # lanes that share the rows of a block
    unroll: int  # rows that a lane loads at once
    sides: tuple[int, int]  # a block's elements along the longer and the shorter side; or 4 each


GPU_TUNING = Tuning(blocks=16, short_lanes=2, splits=8, unroll=8, sides=(4, 8))
# A lane has its block to itself: barriers cost more there than waiting for memory.
CPU_TUNING = Tuning(blocks=64, short_lanes=1, splits=1, unroll=1, sides=(8, 8))


@dataclass(frozen=True)
class _Member:
    """Rows of a gradient from `first` on; see lora_gradient.wgsl."""

    first: int
    shift: int  # left's column is the gradient's row plus this
    right_column: int


def lora_project_gradient(
    program: Program,
    d_y: Tensor | SizedRows,
    lora: LoraFactors,
    *,
    out: Tensor | None = None,
) -> Tensor:  # [rows, members · rank]
    """Appends d_z_g = scale · d_y_g · B_g for all members in one dispatch.

    Args:
        d_y: [rows, out_features of the whole group], f32 or f16; with their sizes rows of f32 are
            scaled for matrix units, which read a copy of f16 in their place where there is one.
        lora: B [sum of the members' out_features, rank].
        out: where to write; a new tensor by default.
    """
    width, rows = lora.n_members * lora.rank, d_y.rows if isinstance(d_y, SizedRows) else d_y
    d_z = out if out is not None else activation(program, extent_of(rows), width)
    plan_project_gradient(program.recording, d_y, lora, d_z).append(program)
    return d_z


def plan_project_gradient(
    recording: Recording,
    d_y: Tensor | SizedRows,
    lora: LoraFactors,
    out: Tensor,
    scales: Tensor | None = None,
) -> Planned:
    """What `lora_project_gradient` appends; with `scales` of d_y's columns d_z of their products.

    Args:
        scales: f32 [columns of d_y], where `scales_columns` says so; None for ones.
    """
    given = d_y if isinstance(d_y, SizedRows) else SizedRows(d_y, None)
    _check_factors(lora)
    _check_output_columns(given.rows, lora)
    check_shape(
        "lora_project_gradient output", out, given.rows.shape[0], lora.n_members * lora.rank
    )
    members = [
        Projection(start, lora.first_feature(index), stop - start, lora.projection_scale(index))
        for index, (start, stop) in enumerate(lora.ranges)
    ]
    return plan_projection(
        recording,
        Operands(
            given.rows, lora.b, out, largest=given.largest, halves=given.halves, scales=scales
        ),
        members,
        transposed=True,
        scale=lora.scale,
        label="lora_project_gradient",
    )


@dataclass(frozen=True)
class ScaledGradient:
    """Where d_y is the gradient to columns that DoRA has scaled: y = scales ∘ p.

    Attributes:
        p: [rows, columns of d_y], f32 or f16.
        scales, inverses: f32 [columns], see `DoraTensors`.
    """

    p: Tensor
    scales: Tensor
    inverses: Tensor


def scales_columns(recording: Recording, rows: int, lora: LoraFactors) -> bool:
    """Whether the low-rank kernels take such a gradient as it is, with a group's magnitudes.

    On matrix units, where a device binds what that takes. Elsewhere `dora_gradient` comes first.

    Args:
        rows: recorded rows.
    """
    shorts = lora.n_members * lora.rank, lora.rank
    cut, facts = gradient_cut(recording, shorts), recording.facts
    projects = projection_cut(recording, rows, lora.rank, lora.n_members, transposed=True)
    if cut is None or projects is None or facts.most_storage_buffers < SCALED_BUFFERS:
        return False
    subgroups = cut["long"] // cut["n"]
    lanes = subgroups * cut["subgroup_lanes"]
    # A lane keeps to its columns; what they come to fits into the tiles, behind the fragments.
    room = cut["tiles"] - subgroups * cut["m"] * cut["n"] // 4
    return lanes % (cut["long"] // 8) == 0 and 2 * lanes <= room


@dataclass(frozen=True)
class GroupGradients:
    """The gradients of one group's factors; attributes as the arguments of `lora_gradients`.

    Attributes:
        d_y: where it has a copy in f16 matrix units read that, but where it is scaled.
        scaled: where d_y is not the products' gradient yet, and gradients have magnitudes.
    """

    x: Tensor
    z: Tensor
    d_y: Tensor | SizedRows
    d_z: Tensor
    lora: LoraFactors
    gradients: Sequence[LoraFactors]
    dropout: GroupDropout | None = None
    scaled: ScaledGradient | None = None

    @property
    def sized(self) -> SizedRows:
        """d_y, with sizes where it has any."""
        return self.d_y if isinstance(self.d_y, SizedRows) else SizedRows(self.d_y, None)


def lora_gradients(
    program: Program,
    x: Tensor,
    z: Tensor,
    d_y: Tensor,
    d_z: Tensor,
    lora: LoraFactors,
    gradients: Sequence[LoraFactors],
    *,
    dropout: GroupDropout | None = None,
) -> None:
    """Appends d_A += d_zᵀ · x and d_B_g += scale · d_y_gᵀ · z_g in one dispatch.

    Args:
        x: [rows, in_features], f32 or f16.
        z: [rows, members · rank] = x · Aᵀ.
        d_y: [rows, out_features of the whole group], f32 or f16.
        d_z: [rows, members · rank] from `lora_project_gradient`.
        lora: the factors.
        gradients: their gradients, one of each slice (one to four): stretch s of the rows is
            added to slice s. In each, B lies behind A in one buffer, as far as in the others.
            How many: `most_slices`.
        dropout: of x before each member's A, as in the forward.
    """
    of_group = GroupGradients(x, z, d_y, d_z, lora, gradients, dropout)
    plan_gradients(program.recording, of_group).append(program)


def plan_gradients(
    recording: Recording, group: GroupGradients, tuning: Tuning | None = None
) -> Planned:
    """What `lora_gradients` appends.

    Args:
        tuning: of plain kernels; None for the device's kind.
    """
    x, z, d_y, d_z, lora = group.x, group.z, group.sized.rows, group.d_z, group.lora
    gradients, dropout = group.gradients, group.dropout
    _check_factors(lora)
    _check_output_columns(d_y, lora)
    check_f32("lora_gradients", z=z, d_z=d_z)
    check_shape("lora_gradients x", x, d_y.shape[0], lora.a.shape[1])
    for name, tensor in (("z", z), ("d_z", d_z)):
        check_shape(f"lora_gradients {name}", tensor, d_y.shape[0], lora.n_members * lora.rank)
    most = most_slices(recording.facts, dropout is not None)
    if not 1 <= len(gradients) <= most:
        raise ValueError(f"lora_gradients: {len(gradients)} slices, expected 1 to {most}")
    if dropout is not None:
        check_shape("lora_gradients keys", dropout.rows, d_y.shape[0])
    for gradient in gradients:
        check_shape("gradient of A", gradient.a, *lora.a.shape)
        check_shape("gradient of B", gradient.b, *lora.b.shape)
    scaled = group.scaled
    whole = [_behind_each_other(gradient, scaled is not None) for gradient in gradients]
    b_start = gradients[0].b.offset - gradients[0].a.offset
    if any(g.b.offset - g.a.offset != b_start for g in gradients):
        raise ValueError("lora_gradients: B lies elsewhere behind A in another slice")
    extent = extent_of(x)
    members = [
        _Member(lora.first_feature(index), start - lora.first_feature(index), index * lora.rank)
        for index, (start, _) in enumerate(lora.ranges)
    ]
    flops = 2 * extent.maximum * (lora.a.size + lora.b.size)
    tensors = [extent.uniform, x, z, d_y, d_z, *whole]
    keys = [] if dropout is None else [dropout.rows, dropout.matrices]
    masks = None if dropout is None else dropout.constants
    halves = group.sized.halves if scaled is None else None
    read = d_y if halves is None else halves  # by matrix units
    of_f16 = scaled is None and x.dtype == read.dtype == "f16"
    shorts = lora.a.shape[0] if dropout is None else lora.rank, lora.rank
    cut = gradient_cut(recording, shorts, extent.maximum // len(gradients) if of_f16 else 0)
    if cut is not None:
        check_shape("lora_gradients halves", read, *d_y.shape)
        tensors[3] = d_y = read
        if halves is not None:
            assert group.sized.largest is not None  # which goes with a copy
            keys.append(group.sized.largest)
        of_units = [
            _matrix_a(x, lora, dropout, cut["long"]),
            _matrix_b(d_y, lora, members, b_start // 16, cut["long"]),
        ]
        p_type = None
        if scaled is not None:
            check_shape("lora_gradients p", scaled.p, *d_y.shape)
            p_type, of_units[1]["magnitudes"] = scaled.p.dtype, _magnitudes_at(gradients)
            of_units[1]["eights"] &= p_type == "f16"  # as d_y's products with p are wanted
            keys += [scaled.p, scaled.scales, scaled.inverses]
        return Planned(
            "lora_gradient_matrix",
            {
                "n_slices": len(gradients),
                "parts": of_units,
                "dropout": masks,
                "p_type": p_type,
                "d_y_copied": halves is not None,
                **cut,
            },
            [*tensors, *keys],
            (sum(part["n_groups"] for part in of_units), 1, len(gradients)),
            "lora_gradients",
            flops,
        )
    if scaled is not None:
        raise ValueError("lora_gradients: scaled columns are for matrix units")
    if tuning is None:
        tuning = CPU_TUNING if recording.facts.is_cpu else GPU_TUNING
    # Of A's rows each member's see another mask, so that no block may have rows of two.
    a_members = range(1 if dropout is None else lora.n_members)
    parts = [
        {  # d_z carries the scale already
            **_outer_product(
                d_z, x, lora.a, [_Member(g * lora.rank, 0, 0) for g in a_members], tuning
            ),
            "left": "d_z",
            "right": "x",
            "scale": 1.0 if dropout is None else dropout.scale,
            "start": 0,
            "masked": dropout is not None,
        },
        {
            **_outer_product(d_y, z, lora.b, members, tuning),
            "left": "d_y",
            "right": "z",
            "scale": lora.scale,
            "start": b_start // 16,
            "masked": False,
        },
    ]
    splits = tuning.splits
    block_bytes = 4 * max(part["lane_left"] * part["lane_right"] for part in parts)
    while splits > 1 and tuning.blocks * splits * block_bytes > recording.facts.workgroup_memory:
        splits //= 2
    return Planned(
        "lora_gradient",
        {
            "n_slices": len(gradients),
            "blocks": tuning.blocks,
            "splits": splits,
            "unroll": tuning.unroll,
            "x_type": x.dtype,
            "d_y_type": d_y.dtype,
            "parts": parts,
            "rank": lora.rank if dropout is not None else 0,
            "dropout": masks,
        },
        [*tensors, *keys],
        (sum(part["n_groups"] for part in parts), 1, len(gradients)),
        "lora_gradients",
        flops,
    )


def _matrix_a(
    x: Tensor, lora: LoraFactors, dropout: GroupDropout | None, long: int
) -> dict[str, Any]:
    """Sizes of d_A for lora_gradient_matrix.wgsl, `long` elements a workgroup.

    All members are one, but where each sees another mask.
    """
    width, in_features = lora.a.shape
    groups, apart = -(-in_features // long), lora.n_members if dropout is not None else 1
    members = [
        {
            "first_group": g * groups, "start": 0, "stop": in_features, "shift": 0,
            "short_column": g * lora.rank,
        }
        for g in range(apart)
    ]  # fmt: skip
    return {  # d_z carries the scale already
        "short": width // apart, "short_name": "d_z", "short_stride": width,
        "n_long": in_features, "long_name": "x", "long_stride": x.shape[1], "long_type": x.dtype,
        "eights": x.dtype == "f16" and x.shape[1] % 8 == 0,
        "members": members, "n_groups": apart * groups,
        "scale": 1.0 if dropout is None else dropout.scale, "start": 0,
    }  # fmt: skip


def _matrix_b(
    d_y: Tensor, lora: LoraFactors, members: Sequence[_Member], b_start: int, long: int
) -> dict[str, Any]:
    """The same of d_B, from vec4 `b_start` of a slice on."""
    of_b, groups = [], 0
    ends = [d_y.shape[1], *(n for member_range in lora.ranges for n in member_range)]
    by_eights = d_y.dtype == "f16" and not any(n % 8 for n in ends)
    for member, (start, stop) in zip(members, lora.ranges, strict=True):
        of_b.append(
            {
                "first_group": groups,
                "start": member.first,
                "stop": member.first + stop - start,
                "shift": member.shift,
                "short_column": member.right_column,
            }
        )
        groups += -(-(stop - start) // long)
    return {
        "short": lora.rank, "short_name": "z", "short_stride": lora.a.shape[0],
        "n_long": lora.b.shape[0], "long_name": "d_y", "long_stride": d_y.shape[1],
        "long_type": d_y.dtype, "eights": by_eights, "members": of_b, "n_groups": groups,
        "scale": lora.scale, "start": b_start,
    }  # fmt: skip


def _magnitudes_at(gradients: Sequence[LoraFactors]) -> int:
    """The vec4 of a slice's binding where the magnitudes begin."""
    places = [m.offset - g.a.offset for g in gradients if (m := g.magnitude) is not None]
    if len(places) != len(gradients) or len({*places}) != 1:
        raise ValueError("lora_gradients: magnitudes lie elsewhere behind A in another slice")
    return places[0] // 16


def _behind_each_other(factors: LoraFactors, magnitudes: bool) -> Tensor:
    """A slice's buffer from A's first element to B's last, or the magnitudes': one binding."""
    a, b = factors.a, factors.b
    if a.buffer is not b.buffer or b.offset < a.offset + a.n_bytes:
        raise ValueError("lora_gradients: the gradient of B does not lie behind that of A")
    last = b
    if magnitudes and factors.magnitude is not None:
        last = factors.magnitude
        if last.buffer is not a.buffer or last.offset < b.offset + b.n_bytes:
            raise ValueError("lora_gradients: that of the magnitudes does not lie behind B's")
    return replace(a, shape=((last.offset - a.offset) // 4 + last.size,))


def _check_factors(lora: LoraFactors) -> None:
    check_shape("A", lora.a, lora.n_members * lora.rank, None)
    check_shape("B", lora.b, sum(stop - start for start, stop in lora.ranges), lora.rank)


def _check_output_columns(d_y: Tensor, lora: LoraFactors) -> None:
    if len(d_y.shape) != 2 or d_y.shape[1] < lora.ranges[-1][1]:
        raise ValueError(f"d_y of shape {d_y.shape} lacks columns of {lora.ranges}")


def _outer_product(
    left: Tensor,
    right: Tensor,
    gradient: Tensor,
    members: Sequence[_Member],
    tuning: Tuning,
) -> dict[str, Any]:
    """Sizes of leftᵀ · right, and of the block that a lane holds of it; see lora_gradient.wgsl.

    Args:
        left: [rows, any].
        right: [rows, any].
        gradient: [n_left, n_right], for its shape.
        members: which columns of left and right make which rows of the gradient.
        tuning: how many lanes hold how much.
    """
    n_left, n_right = gradient.shape
    boundaries = [n for m in members for n in (m.first, m.first + m.shift)]
    widths = [n_left, n_right, left.shape[1], right.shape[1], *boundaries]
    if any(n % 4 for n in widths):
        raise ValueError(f"lora_gradients: widths must be multiples of 4: {widths}")
    lane_left, lane_right = tuning.sides if n_left > n_right else tuning.sides[::-1]
    if any(n % lane_left for n in [n_left, *boundaries]):  # blocks must not straddle two members
        lane_left = 4
    if n_right % lane_right:
        lane_right = 4
    long_blocks, short_blocks = n_left // lane_left, n_right // lane_right
    if n_left <= n_right:
        long_blocks, short_blocks = short_blocks, long_blocks
    short_lanes = max(n for n in range(1, tuning.short_lanes + 1) if short_blocks % n == 0)
    return {
        "n_left": n_left,
        "n_right": n_right,
        "left_stride": left.shape[1],
        "right_stride": right.shape[1],
        "members": [asdict(m) for m in members],
        "lane_left": lane_left,
        "lane_right": lane_right,
        "short_blocks": short_blocks,
        "short_lanes": short_lanes,
        "long_blocks": long_blocks,
        "n_groups": short_blocks // short_lanes * -(-long_blocks // (tuning.blocks // short_lanes)),
    }
