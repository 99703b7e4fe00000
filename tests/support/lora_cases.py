"""For tests of the low-rank kernels: groups of adapted matrices, and all kernels of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora.backward.lora import (
    GroupGradients,
    ScaledGradient,
    plan_gradients,
    plan_project_gradient,
)
from lora.checks.references.rmsnorm import scaled_halves
from lora.forward.dropout import GroupDropout, mask, scale_of
from lora.forward.lora import lora_project
from lora.forward.matmul_paired import row_scales
from lora.forward.model.factors import LoraFactors
from lora.forward.part_product import SizedRows
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor

SCALE = 1.7
UNTOUCHED = -7.0
KEYS = 11, 22, 33, 44  # of members' masks


@dataclass(frozen=True)
class Case:
    """Sizes of a group: x [rows, in_features], members that own `ranges` of d_y's columns.

    Attributes:
        dropout: its probability, before each member.
        member_scales: as of LoraFactors, whose scale is then 1.
        dora: whether d_y is the gradient to columns that DoRA has scaled, on matrix units.
        copied: whether d_y, of f32, has a copy in f16, of rows that are scaled.
    """

    rows: int
    in_use: int
    in_features: int
    rank: int
    ranges: tuple[tuple[int, int], ...]
    n_slices: int = 1
    dropout: float = 0.0
    member_scales: tuple[float, ...] = ()
    dora: bool = False
    copied: bool = False

    def __str__(self) -> str:
        """A test's id: "40/65x260 to 8-40 100-164, rank 16 in 2, dropout 0.1, copied"."""
        ranges = " ".join(f"{first}-{last}" for first, last in self.ranges)
        options = {
            f"dropout {self.dropout}": self.dropout,
            f"{len(self.member_scales)} scales": self.member_scales,
            "DoRA": self.dora,
            "copied": self.copied,
        }
        return ", ".join((
            f"{self.in_use}/{self.rows}x{self.in_features} to {ranges}",
            f"rank {self.rank} in {self.n_slices}",
            *[name for name, given in options.items() if given],
        ))  # fmt: skip

    @property
    def columns(self) -> np.ndarray:
        """Scales of d_y's columns, and inverse lengths: f32 [2, out_features], 1 without DoRA.

        Powers of two: what B is in f16 times the scales f16 has, too.
        """
        rng = np.random.default_rng(self.rank)
        found = 2.0 ** rng.integers(-2, 3, (2, self.out_features))
        return (found if self.dora else np.ones_like(found)).astype(np.float32)

    @property
    def p(self) -> np.ndarray:
        """The products under DoRA, numbers that f16 has [rows, out_features]."""
        rng = np.random.default_rng(self.n_b)
        values = rng.normal(size=(self.rows, self.out_features))
        return values.astype(np.float16).astype(np.float32)

    @property
    def scale(self) -> float:
        """Of all members."""
        return 1.0 if self.member_scales else SCALE

    @property
    def row_keys(self) -> np.ndarray:
        """For dropout, u32 [rows]."""
        return np.random.default_rng(self.rows).integers(0, 2**32, self.rows, np.uint32)

    def masks(self) -> list[np.ndarray]:
        """What each member's x is multiplied by, [rows in use, in_features]."""
        if not self.dropout:
            return [np.ones((self.in_use, self.in_features))] * len(self.ranges)
        keys, width, p = self.row_keys[: self.in_use], self.in_features, self.dropout
        return [mask(keys, key, width, p) * scale_of(p) for key in KEYS[: len(self.ranges)]]

    @property
    def width(self) -> int:
        """Columns of z."""
        return len(self.ranges) * self.rank

    @property
    def n_b(self) -> int:
        """Rows of the stacked B."""
        return sum(stop - start for start, stop in self.ranges)

    @property
    def out_features(self) -> int:
        """Columns of d_y: some that no member owns follow the last one's."""
        return self.ranges[-1][1] + 8


@dataclass(frozen=True)
class Values:
    """What goes in; all float32 [in shapes of the docstrings in backward/lora.py]."""

    x: np.ndarray
    d_y: np.ndarray
    a: np.ndarray
    b: np.ndarray


def values_of(case: Case) -> Values:
    rng = np.random.default_rng(case.rows * 1000 + case.rank)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return Values(
        normal(case.rows, case.in_features),
        normal(case.rows, case.out_features),
        normal(case.width, case.in_features),
        normal(case.n_b, case.rank),
    )


@dataclass(frozen=True)
class Recorded:
    """A case on the device: the program, the tensors it writes, and what these come of."""

    program: Program
    z: Tensor
    d_z: Tensor
    slices: Sequence[LoraFactors]
    x: Tensor
    d_y: Tensor | SizedRows
    lora: LoraFactors
    dropout: GroupDropout | None = None
    scaled: ScaledGradient | None = None

    @property
    def sized(self) -> SizedRows:
        """d_y, with sizes where it has any."""
        return self.d_y if isinstance(self.d_y, SizedRows) else SizedRows(self.d_y, None)


def record(
    recording: Recording,
    case: Case,
    values: Values,
    start: float,
    x_type: str = "f32",
    d_y_type: str = "f32",
    extent: Extent | None = None,
) -> Recorded:
    """All kernels of a case; gradients begin at `start`, z and d_z at UNTOUCHED.

    Rows that are not in use hold NaN, which would spread into every sum that read them.
    """
    extent = extent or recording.memory.extent(case.rows)
    recording.memory.set_rows(extent, case.in_use)

    def activation(array: np.ndarray, dtype: str) -> Tensor:
        tensor = recording.memory.empty(array.shape, dtype, extent=extent)
        stale = array.copy()
        stale[case.in_use :] = np.nan
        recording.memory.write(tensor, stale)
        return tensor

    def factors(a: np.ndarray, b: np.ndarray) -> LoraFactors:
        # Behind each other in one flat buffer, on multiples of 64 elements, as the trainer has it.
        first = -(-a.size // 64) * 64
        last = first + -(-b.size // 64) * 64
        flat = np.full(last + len(b) if case.dora else first + b.size, UNTOUCHED, np.float32)
        flat[: a.size], flat[first : first + b.size] = a.reshape(-1), b.reshape(-1)
        flat[last:] = start
        tensor = recording.memory.upload(flat)
        return LoraFactors(
            tensor.slice(0, a.size).reshape(*a.shape),
            tensor.slice(first, first + b.size).reshape(*b.shape),
            case.rank,
            case.scale,
            case.ranges,
            case.member_scales,
            tensor.slice(last, flat.size) if case.dora else None,
        )

    x, d_y = activation(values.x, x_type), activation(values.d_y, d_y_type)
    lora = factors(values.a, values.b)
    slices = [
        factors(np.full_like(values.a, start), np.full_like(values.b, start))
        for _ in range(case.n_slices)
    ]
    program, dropout = Program(recording), None
    if case.dropout:
        keys = recording.memory.empty((case.rows,), "u32", extent=extent)
        recording.memory.write(keys, case.row_keys)
        dropout = GroupDropout(case.dropout, keys, recording.memory.constant_uniform(KEYS))
    scaled = None
    if case.dora:
        scales, inverses = (recording.memory.upload(values) for values in case.columns)
        scaled = ScaledGradient(activation(case.p, d_y_type), scales, inverses)
    z = lora_project(program, x, lora, dropout=dropout)
    sized = SizedRows(d_y, row_scales(program, d_y, 6, "d_y"))
    if case.copied:  # of memory of its own: that of sizes is shared
        largest = recording.memory.upload(np.abs(values.d_y).max(axis=1).view(np.uint32))
        sized = SizedRows(d_y, largest, activation(scaled_halves(values.d_y), "f16"))
    d_z = recording.memory.empty((case.rows, case.width), extent=extent)
    scales = None if scaled is None else scaled.scales
    plan_project_gradient(recording, sized, lora, d_z, scales).append(program)
    group = GroupGradients(x, z, sized if case.copied else d_y, d_z, lora, slices, dropout, scaled)
    plan_gradients(recording, group).append(program)
    for tensor in (z, d_z):
        recording.memory.write(tensor, np.full(tensor.shape, UNTOUCHED))
    return Recorded(program, z, d_z, slices, x, group.d_y, lora, dropout, scaled)
