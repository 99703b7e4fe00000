"""The gradient of the rotary embedding against float64 numpy."""

import numpy as np
import pytest

from lora.backward.rope import rope_backward
from lora.checks.references.rope import rope_backward_reference, rope_reference
from lora.forward.heads import Rotation
from lora.forward.model.rope_frequencies import Rope
from lora.forward.rope import HeadSums, rope
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.half_tensors import needs_halves, typed
from tests.support.kernels import activation, central_difference, extent_in_use, run_twice
from tests.support.rope_cases import SHAPES
from tests.support.stretches import same

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


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(
    ("shared", "n_kv_heads", "head_size", "dtype"),
    [(2, 1, 8, "f32"), (3, 2, 16, "f16"), (1, 3, 24, "f32")],
)
def test_sums_of_heads(
    recording: Recording, shared: int, n_kv_heads: int, head_size: int, dtype: str,
    interleaved: bool,
) -> None:  # fmt: skip
    """To the bits of keys and values that are summed first; what they held before is not read."""
    if dtype == "f16":
        needs_halves(recording.facts)
    n_heads, rows, in_use = shared * n_kv_heads, 19, 17
    rng, of_kv = np.random.default_rng(0), 2 * n_kv_heads * head_size
    sums = recording.memory.upload(
        rng.normal(size=(rows, 2 * n_heads * head_size)).astype(np.float32)
    )
    extent, positions = extent_in_use(recording, rows, in_use), np.arange(rows, dtype=np.uint32)
    tables = recording.memory.upload(Rope(BASE, head_size, interleaved).tables(32))
    rotation = Rotation(activation(recording, positions, extent), tables, interleaved)
    d_qkv = np.concatenate(
        [rng.normal(size=(rows, n_heads * head_size)), np.full((rows, of_kv), np.nan)], axis=1
    )
    apart, at_once = (typed(recording, d_qkv, dtype, extent) for _ in range(2))
    program, n_turned = Program(recording), n_heads + n_kv_heads
    program.dispatch(
        "attention_backward_kv_sum",
        {
            "n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_size": head_size,
            "stride": d_qkv.shape[1] // 4, "lanes": 64, "d_qkv_type": dtype,
        },
        [extent.uniform, sums, apart], -(-rows * of_kv // 256),
    )  # fmt: skip
    rope_backward(program, apart, rotation, n_turned, head_size)
    rope_backward(
        program, at_once, rotation, n_turned, head_size, sums=HeadSums(sums, n_heads, n_kv_heads)
    )
    program.run()
    found, expected = recording.memory.read(at_once), recording.memory.read(apart)
    assert same(recording, [dtype], [found[:in_use]], [expected[:in_use]], roundings=2)
    assert np.isfinite(found[:in_use]).all() and np.isnan(found[in_use:, -of_kv:]).all()


def test_sums_of_other_heads_are_refused(recording: Recording) -> None:
    extent = recording.memory.extent(2)
    d_qkv, sums = (recording.memory.empty((2, n), extent=extent) for n in (64, 64))
    positions = recording.memory.empty((2,), "u32", extent=extent)
    rotation = Rotation(positions, recording.memory.empty((9, 4, 2)), interleaved=False)
    for n_turned, n_heads, match in ((6, 4, "sums of 4 heads for 3"), (6, 3, "sums has shape")):
        with pytest.raises(ValueError, match=match):
            rope_backward(
                Program(recording), d_qkv, rotation, n_turned, 8, sums=HeadSums(sums, n_heads, 3)
            )
