"""Rows as whole numbers: what they stand for, against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest

from lora.checks.references.matmul_row import normed_row
from lora.forward.gguf.quantization import QUANTIZATIONS
from lora.forward.int_row import IntRow, RowNorm, takes_int_row, to_int_row
from lora.forward.model.norm import Norm
from lora.forward.model.weights import FrozenMatrix, MatrixPart
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import activation, extent_in_use, marked, with_facts
from tests.support.one_row import EPSILON, check_int_row, numbers


def int_row_of(recording: Recording, width: int) -> IntRow:
    row = IntRow.allocate(recording, width, extent_in_use(recording, 1, 1))
    recording.memory.write(row.words, np.full(row.words.shape, 0xDEADBEEF, np.uint32))
    return row


@pytest.mark.parametrize("width", [32, 96, 576, 2080, 4096])
@pytest.mark.parametrize("with_weight", [False, True], ids=["plain", "weight"])
def test_a_row(recording: Recording, width: int, with_weight: bool) -> None:
    rng = np.random.default_rng(width)
    x = numbers(rng, 1, width) * np.exp(rng.normal(0, 3, (1, width))).astype(np.float32)
    x[0, :32] = 0  # a block of zeros has a scale, too
    weight = numbers(rng, width) if with_weight else None
    to = int_row_of(recording, width)
    if weight is not None:
        to = to.before_norm(Norm(recording.memory.upload(weight), EPSILON))
    program = Program(recording)
    to_int_row(program, activation(recording, x, extent_in_use(recording, 1, 1)), to)
    program.run()
    exact = x[0].astype(np.float64)
    v = exact if weight is None else exact * weight
    check_int_row(recording.memory.read(to.words), v, exact, error=2.0**-24)


@pytest.mark.parametrize(
    ("width", "residual", "with_weight"),
    [
        (32, False, False),
        (32, True, True),
        (640, False, True),
        (1152, True, False),
        (5376, False, False),
        (5376, True, True),
    ],
)
def test_a_norm_before(recording: Recording, width: int, residual: bool, with_weight: bool) -> None:
    """y = norm(x) ∘ weight + residual, written and as whole numbers."""
    rng = np.random.default_rng(width)
    x, weight, before = numbers(rng, 1, width), numbers(rng, width), numbers(rng, 1, width)
    following = numbers(rng, width) if with_weight else None
    extent = extent_in_use(recording, 1, 1)
    out = marked(recording, extent, width)
    to = int_row_of(recording, width)
    if following is not None:
        to = to.before_norm(Norm(recording.memory.upload(following), EPSILON))
    past = activation(recording, before, extent) if residual else None
    norm = RowNorm(Norm(recording.memory.upload(weight), EPSILON), out, past)
    program = Program(recording)
    to_int_row(program, activation(recording, x, extent), to, norm=norm)
    program.run()
    y = recording.memory.read(out)[0].astype(np.float64)
    exact = normed_row(x, weight, EPSILON)[0] + (before[0] if residual else 0.0)
    # The sum of squares is f32, and so is each product on the way.
    size = np.abs(normed_row(x, weight, EPSILON)[0]) + np.abs(before[0] if residual else 0.0)
    assert (np.abs(y - exact) <= 2.0**-20 * size).all()
    check_int_row(
        recording.memory.read(to.words),
        y if following is None else y * following,
        y,
        error=2.0**-24,
    )


def test_which_products_take_one(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    def matrix(*names: str) -> FrozenMatrix:
        parts = []
        for name in names:
            quantization = next(q for q in QUANTIZATIONS.values() if q.name == name)
            words = recording.memory.empty((4, quantization.row_words(256)), "u32")
            parts.append(MatrixPart(quantization, words, 4 * len(parts)))
        return FrozenMatrix(4 * len(parts), 256, tuple(parts))

    recording = with_facts(recording, is_cpu=False)
    assert takes_int_row(recording, matrix("q4_0", "q6_k"))
    assert not takes_int_row(recording, matrix("q4_0", "f16"))
    monkeypatch.setitem(recording.facts.info, "backend_type", "Metal")
    assert not takes_int_row(recording, matrix("q4_0"))
    monkeypatch.setitem(recording.facts.info, "backend_type", "Vulkan")
    recording = with_facts(recording, is_cpu=True)
    assert not takes_int_row(recording, matrix("q4_0"))


def test_what_cannot_be_is_refused(recording: Recording) -> None:
    extent = extent_in_use(recording, 1, 1)
    with pytest.raises(ValueError, match="no whole number of blocks"):
        IntRow.allocate(recording, 48, extent)
    row = IntRow.allocate(recording, 64, extent)
    with pytest.raises(ValueError, match="int row has shape"):
        to_int_row(
            Program(recording), activation(recording, np.zeros((1, 32), np.float32), extent), row
        )
    with pytest.raises(ValueError, match="int row's norm has shape"):
        row.before_norm(Norm(recording.memory.empty((32,)), EPSILON))
    halves = recording.memory.empty((1, 64), "f16", extent=extent)
    with pytest.raises(ValueError, match="cannot become whole numbers"):
        to_int_row(Program(recording), halves, row)
