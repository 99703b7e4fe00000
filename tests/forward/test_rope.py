"""Rotary embedding against float64 numpy."""

from dataclasses import replace

import numpy as np
import pytest

from lora.checks.references.rope import rope_reference
from lora.forward.heads import Rotation
from lora.forward.model.rope_frequencies import Rope
from lora.forward.plans.stretches import Stretches
from lora.forward.rope import RopeAfter, rope
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.half_tensors import (
    assert_rounded_once,
    needs_halves,
    rounded,
    typed,
    typed_marked,
)
from tests.support.kernels import MARKER, activation, extent_in_use, run_twice
from tests.support.rope_cases import SHAPES
from tests.support.stretches import finish, in_stretches, same


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


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(
    ("n_heads", "head_size", "width", "splits", "dtype"),
    [(1, 8, 8, 2, "f32"), (3, 16, 64, 3, "f16"), (6, 64, 576, 7, "f32")],
)
def test_a_product_in_stretches(
    recording: Recording, n_heads: int, head_size: int, width: int, splits: int, dtype: str,
    interleaved: bool,
) -> None:  # fmt: skip
    """To the bits of the product that is finished first; what doesn't turn is written, too."""
    if dtype == "f16":
        needs_halves(recording.facts)
    stretches = in_stretches(recording, splits, 19, width)
    extent, positions = extent_in_use(recording, 19, 17), np.arange(19, dtype=np.uint32) * 61
    tables = recording.memory.upload(Rope(10000.0, head_size, interleaved).tables(2000))
    rotation = Rotation(activation(recording, positions, extent), tables, interleaved)
    apart, at_once = (typed_marked(recording, dtype, extent, width) for _ in range(2))
    after, program = RopeAfter(rotation, n_heads, head_size), Program(recording)
    assert after.adds_up(recording, width, splits)
    finish(program, stretches, apart)
    rope(program, apart, rotation, n_heads, head_size)
    after.record(program, at_once, stretches)
    program.run()
    found, expected = recording.memory.read(at_once), recording.memory.read(apart)
    assert same(recording, [dtype], [found], [expected], roundings=2)  # with a sum of two products
    assert (found[:17] != MARKER).all() and (found[17:] == MARKER).all()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_columns_of_a_product_in_stretches_are_scaled(
    recording: Recording, dtype: str, interleaved: bool
) -> None:
    """As DoRA's are; what was summed is kept as it was before."""
    if dtype == "f16":
        needs_halves(recording.facts)
    extent, positions = extent_in_use(recording, 19, 17), np.arange(19, dtype=np.uint32) * 61
    tables = recording.memory.upload(Rope(10000.0, 16, interleaved).tables(2000))
    rotation = Rotation(activation(recording, positions, extent), tables, interleaved)
    after, program, found = RopeAfter(rotation, 3, 16), Program(recording), []
    scales = recording.memory.upload(np.linspace(0.5, 3, 64, dtype=np.float32))
    for at_once in (False, True):
        out, kept = (typed_marked(recording, dtype, extent, 64) for _ in range(2))
        plain = in_stretches(recording, 3, 19, 64)
        stretches = replace(plain, scales=scales, kept=kept)
        if at_once:
            after.record(program, out, stretches)
        else:
            finish(program, stretches, out)
            after.record(program, out)
        found.append((out, kept))
    assert after.scales_columns and len(program.dispatches) == 3
    program.run()
    expected, values = ([recording.memory.read(t) for t in pair] for pair in found)
    assert same(recording, [dtype] * 2, values, expected, roundings=2)
    assert all((v[17:] == MARKER).all() for v in values)


def test_heads_that_turn_in_part_take_no_stretches(recording: Recording) -> None:
    extent = recording.memory.extent(2)
    qkv = recording.memory.empty((2, 48), extent=extent)
    positions = recording.memory.empty((2,), "u32", extent=extent)
    rotation = Rotation(positions, recording.memory.empty((9, 4, 2)), interleaved=False)
    assert not RopeAfter(rotation, 3, 16).adds_up(recording, 48, 2)
    with pytest.raises(ValueError, match="heads of 16 with 4 pairs take no sums"):
        rope(Program(recording), qkv, rotation, 3, 16,
             source=Stretches(recording.memory.empty((4, 48)), 2))  # fmt: skip
