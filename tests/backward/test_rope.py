"""The gradient of the rotary embedding against float64 numpy."""

import numpy as np
import pytest

from lora.backward.rope import rope_backward
from lora.checks.references.rope import rope_backward_reference, rope_reference
from lora.forward.heads import Rotation
from lora.forward.model.rope_frequencies import Rope
from lora.forward.rope import rope
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import activation, central_difference, extent_in_use, run_twice
from tests.support.rope_cases import SHAPES

BASE = 10000.0


@pytest.mark.parametrize("interleaved", [True, False])
def test_reference_is_the_derivative(interleaved: bool) -> None:
    rng = np.random.default_rng(0)
    qkv, d_y, direction = (rng.normal(size=(5, 28)) for _ in range(3))
    layout = (np.arange(5) * 37, 100.0, 8, 2, 12, interleaved)
    slope = central_difference(
        lambda v: float((rope_reference(v, *layout) * d_y).sum()), qkv, direction
    )
    expected = (rope_backward_reference(d_y, *layout) * direction).sum()
    assert slope == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("rows", "in_use", "n_heads", "head_size", "dimensions", "width"), SHAPES)
def test_rope_backward(
    recording: Recording, rows: int, in_use: int, n_heads: int, head_size: int, dimensions: int,
    width: int, interleaved: bool,
) -> None:  # fmt: skip
    rng = np.random.default_rng(rows)
    d_qkv = rng.normal(size=(rows, width)).astype(np.float32)
    positions = rng.integers(0, 5000, rows)
    extent = extent_in_use(recording, rows, in_use)
    tensor = activation(recording, d_qkv, extent)
    program = Program(recording)
    rope_backward(
        program,
        tensor,
        Rotation(
            activation(recording, positions, extent),
            recording.memory.upload(Rope(BASE, dimensions, interleaved).tables(5000)),
            interleaved,
        ),
        n_heads,
        head_size,
    )
    result = run_twice(program, tensor)
    expected = rope_backward_reference(
        d_qkv, positions, BASE, dimensions, n_heads, head_size, interleaved
    )
    # Tables rounded to f32, two products and a sum: 4 ulp of values up to about 5.
    np.testing.assert_allclose(result[:in_use], expected[:in_use], atol=2e-6)
    assert (result[in_use:] == d_qkv[in_use:]).all()
    assert (result[:, n_heads * head_size :] == d_qkv[:, n_heads * head_size :]).all()


@pytest.mark.parametrize("interleaved", [True, False])
def test_there_and_back(recording: Recording, interleaved: bool) -> None:
    """The rotation is orthogonal: the gradient's kernel undoes the forward's."""
    qkv = np.random.default_rng(2).normal(size=(67, 100)).astype(np.float32)
    extent = recording.memory.extent(67)
    tensor = activation(recording, qkv, extent)
    positions = activation(recording, np.arange(67) * 61, extent)
    tables = recording.memory.upload(Rope(BASE, 12, interleaved).tables(4096))
    program = Program(recording)
    for turn in (rope, rope_backward):
        turn(program, tensor, Rotation(positions, tables, interleaved), 3, 20)
    # Twice the rounding of one rotation.
    np.testing.assert_allclose(run_twice(program, tensor), qkv, atol=4e-6)
