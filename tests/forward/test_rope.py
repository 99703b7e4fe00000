"""Rotary embedding against float64 numpy."""

import numpy as np
import pytest

from lora.checks.references.rope import rope_reference
from lora.forward.heads import Rotation
from lora.forward.model.rope_frequencies import Rope
from lora.forward.rope import rope
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.half_tensors import assert_rounded_once, needs_halves, rounded, typed
from tests.support.kernels import activation, extent_in_use, run_twice
from tests.support.rope_cases import SHAPES


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("rows", "in_use", "n_heads", "head_size", "dimensions", "width"), SHAPES)
def test_rope(
    recording: Recording, rows: int, in_use: int, n_heads: int, head_size: int, dimensions: int,
    width: int, interleaved: bool,
) -> None:  # fmt: skip
    rng = np.random.default_rng(rows)
    qkv = rng.normal(size=(rows, width)).astype(np.float32)
    positions = rng.integers(0, 5000, rows)
    extent = extent_in_use(recording, rows, in_use)
    tensor = activation(recording, qkv, extent)
    program = Program(recording)
    rope(
        program,
        tensor,
        Rotation(
            activation(recording, positions, extent),
            recording.memory.upload(Rope(10000.0, dimensions, interleaved).tables(5000)),
            interleaved,
        ),
        n_heads,
        head_size,
    )
    result = run_twice(program, tensor)
    expected = rope_reference(qkv, positions, 10000.0, dimensions, n_heads, head_size, interleaved)
    # Tables rounded to f32, two products and a sum: 4 ulp of values up to about 5.
    np.testing.assert_allclose(result[:in_use], expected[:in_use], atol=2e-6)
    assert (result[in_use:] == qkv[in_use:]).all()
    assert (result[:, n_heads * head_size :] == qkv[:, n_heads * head_size :]).all()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dimensions", [8, 12], ids=["in fours", "one by one"])
def test_rope_of_halves(recording: Recording, dimensions: int, interleaved: bool) -> None:
    needs_halves(recording.facts)
    rng = np.random.default_rng(5)
    qkv = rounded(rng.normal(size=(67, 100)), "f16")
    positions = rng.integers(0, 5000, 67)
    extent = extent_in_use(recording, 67, 66)
    tensor = typed(recording, qkv, "f16", extent)
    tables = recording.memory.upload(Rope(10000.0, dimensions, interleaved).tables(5000))
    program = Program(recording)
    rope(
        program, tensor,
        Rotation(activation(recording, positions, extent), tables, interleaved), 3, 20,
    )  # fmt: skip
    result = run_twice(program, tensor)
    expected = rope_reference(qkv, positions, 10000.0, dimensions, 3, 20, interleaved)
    # As in test_rope, and the rounding of the result.
    assert_rounded_once(result[:66], expected[:66], rtol=0, atol=2e-6)
    assert (result[66:] == qkv[66:]).all()
    assert (result[:, 60:] == qkv[:, 60:]).all()


def test_heads_that_do_not_fit_are_refused(recording: Recording) -> None:
    extent = recording.memory.extent(2)
    qkv = recording.memory.empty((2, 16), extent=extent)
    positions = recording.memory.empty((2,), "u32", extent=extent)
    tables = recording.memory.upload(Rope(10.0, 8, interleaved=True).tables(4))
    with pytest.raises(ValueError, match="do not fit"):
        rope(Program(recording), qkv, Rotation(positions, tables, interleaved=True), 3, 8)
