"""DoRA's kernels against float64 numpy, by the checks that devices get, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from lora.backward.dora import dora_gradient
from lora.checks.kernels.dora import CHECKS
from lora.checks.suite import Check
from lora.forward.dora import dora_tensors, row_lengths, scale_columns
from lora.forward.model.factors import LoraFactors
from lora.forward.model.weights import load_matrix
from lora.shaders.program import Program
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


@pytest.mark.parametrize("is_cpu", [True, False])
@pytest.mark.parametrize(
    ("kinds", "n_out", "n_in", "rank", "ranges"),
    [
        (("F16",), 4, 4, 4, ((0, 4),)),
        (("F16",), 44, 100, 12, ((4, 20), (20, 44))),
        (("Q8_0", "F16", "Q4_1"), 64, 2112, 4, ((0, 12), (60, 140))),  # none of the last's
        (("Q6_K", "Q4_K"), 20, 2560, 32, ((8, 32),)),
    ],
)
def test_lengths_of_parts(
    recording: Recording,
    is_cpu: bool,
    kinds: tuple[str, ...],
    n_out: int,
    n_in: int,
    rank: int,
    ranges: tuple[tuple[int, int], ...],
) -> None:
    """Sums of squares in f32: roundings of a sum over rows partly cancel."""
    recording, rng = with_facts(recording, is_cpu=is_cpu), np.random.default_rng(n_in)
    types = [GGMLQuantizationType[kind] for kind in kinds]
    parts = [
        tensor_of(kind, random_blocks(kind, n_out, n_in, seed), n_in)
        for seed, kind in enumerate(types)
    ]
    w = np.concatenate([dequantized(part) for part in parts]).astype(np.float64)
    matrix, memory = load_matrix(recording, parts), recording.memory
    n_b = sum(stop - start for start, stop in ranges)
    a, b = rng.normal(size=(len(ranges) * rank, n_in)), rng.normal(size=(n_b, rank))
    a, b = a.astype(np.float32), b.astype(np.float32)
    m, scales = rng.uniform(0.5, 2, n_b).astype(np.float32), (0.5, 3.0)[: len(ranges)]
    tensors = dora_tensors(recording, matrix)
    lora = LoraFactors(
        memory.upload(a), memory.upload(b), rank, 1.0, ranges, scales, memory.upload(m), tensors
    )
    program = Program(recording)
    row_lengths(program, matrix, lora, "group")
    program.run()
    expected, row = np.ones(len(w)), 0
    inverses = np.zeros(len(w))
    for g, (start, stop) in enumerate(ranges):
        of_b = slice(row, row + stop - start)
        whole = w[start:stop] + scales[g] * b[of_b].astype(float) @ a[g * rank : (g + 1) * rank]
        inverses[start:stop] = 1 / np.linalg.norm(whole, axis=1)
        expected[start:stop] = m[of_b] * inverses[start:stop]
        row += stop - start
    np.testing.assert_allclose(memory.read(tensors.scales), expected, rtol=1e-5)
    np.testing.assert_allclose(memory.read(tensors.inverses), inverses, rtol=1e-5)
    for part, powers in zip(matrix.parts, tensors.powers, strict=True):
        own = expected[part.first_feature :][: part.out_features]
        np.testing.assert_allclose(memory.read(powers), [*own, 1, 1], rtol=1e-5)


def test_a_row_of_zeros_has_no_inverse(recording: Recording) -> None:
    kind, memory = GGMLQuantizationType.F16, recording.memory
    matrix = load_matrix(recording, [tensor_of(kind, np.zeros((4, 64), np.uint8), 32)])
    tensors, zeros = dora_tensors(recording, matrix), np.zeros((4, 32), np.float32)
    lora = LoraFactors(
        memory.upload(zeros), memory.upload(zeros[:, :4]), 4, 1.0, ((0, 4),),
        magnitude=memory.upload(np.ones(4, np.float32)), dora=tensors,
    )  # fmt: skip
    program = Program(recording)
    row_lengths(program, matrix, lora, "group")
    program.run()
    assert not memory.read(tensors.inverses).any() and not memory.read(tensors.scales).any()


def test_shapes_that_do_not_fit(recording: Recording) -> None:
    memory = recording.memory
    extent = memory.extent(4)
    x = memory.empty((4, 8), extent=extent)
    with pytest.raises(ValueError, match="scale_columns scales"):
        scale_columns(Program(recording), x, memory.empty((4,)), x)
    lora = LoraFactors(memory.empty((4, 8)), memory.empty((8, 4)), 4, 1.0, ((0, 8),))
    with pytest.raises(ValueError, match="no magnitudes"):
        dora_gradient(Program(recording), x, x, lora, memory.empty((8,)), x)
