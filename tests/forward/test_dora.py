"""DoRA's kernels against float64 numpy, by the checks that devices get, and what they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from lora.backward.dora import dora_gradient
from lora.checks.kernels.dora import CHECKS
from lora.checks.suite import Check
from lora.forward.dora import DoraGroup, allocate_lengths, row_lengths, scale_columns
from lora.forward.gguf.file import GGUFTensor
from lora.forward.model.factors import LoraFactors
from lora.forward.model.weights import load_matrix
from lora.shaders.program import Dispatch, Program
from lora.shaders.recording import Recording
from tests.support.kernels import central_difference, with_facts
from tests.support.quantized_tensors import dequantized, random_blocks, tensor_of


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_kernels(recording: Recording, check: Check) -> None:
    comparison = check.run(with_facts(recording, is_cpu=check.as_cpu))
    assert comparison.passed, comparison


def test_the_gradient_is_the_derivative_with_lengths_held() -> None:
    """Of y = m · p / n by m and by p, in numpy: what the kernels are checked against."""
    rng = np.random.default_rng(0)
    p, d_y, n, m = (
        rng.normal(size=(5, 4)),
        rng.normal(size=(5, 4)),
        rng.uniform(1, 2, 4),
        np.ones(4),
    )
    by_m, by_p = (d_y * p).sum(0) / n, d_y * m / n
    for formula, at, found in (
        (lambda v: float((d_y * v * p / n).sum()), m, by_m),
        (lambda v: float((d_y * m * v / n).sum()), p, by_p),
    ):
        direction = rng.normal(size=at.shape)
        slope = central_difference(formula, at, direction)
        assert slope == pytest.approx(float((found * direction).sum()), rel=1e-7)


@dataclass(frozen=True)
class Group:
    """An adapted matrix, its adapter in numpy, and what its rows' lengths come to.

    Attributes:
        kinds: of its parts, of `n_out` rows each.
    """

    kinds: tuple[str, ...]
    n_out: int
    n_in: int
    rank: int
    ranges: tuple[tuple[int, int], ...]
    seed: int = 0

    @property
    def n_b(self) -> int:
        """Rows of B."""
        return sum(stop - start for start, stop in self.ranges)

    @property
    def member_scales(self) -> tuple[float, ...]:
        """Of z."""
        return (0.5, 3.0)[: len(self.ranges)]

    def parts(self) -> list[GGUFTensor]:
        """Of random blocks."""
        types = [GGMLQuantizationType[kind] for kind in self.kinds]
        return [
            tensor_of(kind, random_blocks(kind, self.n_out, self.n_in, self.seed + i), self.n_in)
            for i, kind in enumerate(types)
        ]

    def adapter(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A, B and magnitudes, f32."""
        rng = np.random.default_rng(self.n_in + self.seed)
        a = rng.normal(size=(len(self.ranges) * self.rank, self.n_in))
        b, m = rng.normal(size=(self.n_b, self.rank)), rng.uniform(0.5, 2, self.n_b)
        return a.astype(np.float32), b.astype(np.float32), m.astype(np.float32)

    def reference(self) -> tuple[np.ndarray, np.ndarray]:
        """Scales and inverses, float64."""
        w = np.concatenate([dequantized(part) for part in self.parts()]).astype(np.float64)
        scales, inverses, row = np.ones(len(w)), np.zeros(len(w)), 0
        a, b, m = self.adapter()
        for g, (start, stop) in enumerate(self.ranges):
            of_b, low = slice(row, row + stop - start), slice(g * self.rank, (g + 1) * self.rank)
            whole = w[start:stop] + self.member_scales[g] * b[of_b].astype(float) @ a[low]
            inverses[start:stop] = 1 / np.linalg.norm(whole, axis=1)
            scales[start:stop] = m[of_b] * inverses[start:stop]
            row += stop - start
        return scales, inverses


def check_lengths(recording: Recording, groups: Sequence[Group]) -> list[Dispatch]:
    """Sums of squares in f32: roundings of a sum over rows partly cancel."""
    memory = recording.memory
    matrices = [load_matrix(recording, group.parts()) for group in groups]
    values = [array for group in groups for array in group.adapter()]
    starts = np.cumsum([0, *(-(-array.size // 64) * 64 for array in values)]).tolist()
    flat = np.full(starts[-1], np.nan, np.float32)
    for start, array in zip(starts, values, strict=False):
        flat[start : start + array.size] = array.reshape(-1)
    whole = memory.upload(flat)
    tensors = iter(
        whole.slice(start, start + array.size).reshape(*array.shape)
        for start, array in zip(starts, values, strict=False)
    )
    lengths = allocate_lengths(recording, matrices)
    found = []
    for group, matrix, own in zip(groups, matrices, lengths, strict=True):
        a, b, m = (next(tensors) for _ in range(3))
        lora = LoraFactors(a, b, group.rank, 1.0, group.ranges, group.member_scales, m, own)
        found.append(DoraGroup(matrix, lora))
    program = Program(recording)
    row_lengths(program, found)
    program.run()
    for group, matrix, own in zip(groups, matrices, lengths, strict=True):
        scales, inverses = group.reference()
        np.testing.assert_allclose(memory.read(own.scales), scales, rtol=1e-5)
        np.testing.assert_allclose(memory.read(own.inverses), inverses, rtol=1e-5)
        for part, powers in zip(matrix.parts, own.powers, strict=True):
            of_part = scales[part.first_feature :][: part.out_features]
            np.testing.assert_allclose(memory.read(powers), [*of_part, 1, 1], rtol=1e-5)
    return program.dispatches


@pytest.mark.parametrize("is_cpu", [True, False])
@pytest.mark.parametrize(
    "group",
    [
        Group(("F16",), 4, 4, 4, ((0, 4),)),
        Group(("F16",), 44, 100, 12, ((4, 20), (20, 44))),
        Group(("Q8_0", "F16", "Q4_1"), 64, 2112, 4, ((0, 12), (60, 140))),  # none of the last's
        Group(("Q6_K", "Q4_K"), 20, 2560, 32, ((8, 32),)),
    ],
    ids=str,
)
def test_lengths_of_parts(recording: Recording, is_cpu: bool, group: Group) -> None:
    check_lengths(with_facts(recording, is_cpu=is_cpu), [group])


@pytest.mark.parametrize("kind", ["F16", "Q4_1", "Q6_K"])
@pytest.mark.parametrize("buffers", [5, 8])
def test_matrices_that_are_alike_share_a_dispatch(
    recording: Recording, kind: str, buffers: int
) -> None:
    """Those of other layers, as many as can be bound."""
    n_in = 100 if kind == "F16" else 256
    alike = [Group((kind,), 36, n_in, 8, ((0, 8), (20, 34)), seed) for seed in range(7)]
    others = [Group((kind,), 20, n_in, 8, ((0, 20),), 10 + seed) for seed in range(7)]
    mixed = [group for pair in zip(alike, others, strict=True) for group in pair]
    recording = with_facts(recording, is_cpu=False, most_storage_buffers=buffers)
    most = buffers - 3
    assert len(check_lengths(recording, mixed)) == 2 * -(-7 // most)
    # Not in one binding of what they need of the adapter: here a group at a time.
    small = with_facts(recording, max_binding=4 * (16 * n_in + 1200))
    assert len(check_lengths(small, mixed)) > 2 * -(-7 // most)


@pytest.mark.parametrize(
    ("kind", "n_in", "room", "staged"),
    [
        ("Q4_1", 576, 32768, True),
        ("Q4_1", 576, 16384, True),
        ("Q4_1", 1536, 32768, True),
        ("Q4_1", 1536, 16384, False),  # its rows alone fill a workgroup's memory
        ("F16", 1536, 32768, False),
    ],
)
def test_short_rows_of_many_matrices_are_staged(
    recording: Recording, kind: str, n_in: int, room: int, staged: bool
) -> None:
    recording = with_facts(recording, is_cpu=False, workgroup_memory=room, most_lanes=256)
    alike = [Group((kind,), 60, n_in, 16, ((0, 20), (20, 51)), seed) for seed in range(2)]
    dispatches = check_lengths(recording, alike)
    assert {d.constants["teams"] for d in dispatches} == {2 if staged else 1}
    assert len(dispatches) == (1 if staged else 2)


def test_a_row_of_zeros_has_no_inverse(recording: Recording) -> None:
    kind, memory = GGMLQuantizationType.F16, recording.memory
    matrix = load_matrix(recording, [tensor_of(kind, np.zeros((4, 64), np.uint8), 32)])
    (own,) = allocate_lengths(recording, [matrix])
    flat = memory.upload(np.zeros(256, np.float32))
    lora = LoraFactors(
        flat.slice(0, 128).reshape(4, 32), flat.slice(128, 144).reshape(4, 4), 4, 1.0, ((0, 4),),
        magnitude=flat.slice(192, 196), dora=own,
    )  # fmt: skip
    program = Program(recording)
    row_lengths(program, [DoraGroup(matrix, lora)])
    program.run()
    assert not memory.read(own.inverses).any() and not memory.read(own.scales).any()


def test_shapes_that_do_not_fit(recording: Recording) -> None:
    memory = recording.memory
    extent = memory.extent(4)
    x = memory.empty((4, 8), extent=extent)
    with pytest.raises(ValueError, match="scale_columns scales"):
        scale_columns(Program(recording), x, memory.empty((4,)), x)
    lora = LoraFactors(memory.empty((4, 8)), memory.empty((8, 4)), 4, 1.0, ((0, 8),))
    with pytest.raises(ValueError, match="no magnitudes"):
        dora_gradient(Program(recording), x, x, lora, memory.empty((8,)), x)
