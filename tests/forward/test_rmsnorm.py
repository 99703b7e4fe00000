"""RMSNorm against float64 numpy."""

from dataclasses import replace

import numpy as np
import pytest

from lora.checks.references.rmsnorm import rmsnorm_reference, scaled_halves
from lora.forward.model.factors import LoraFactors
from lora.forward.model.norm import Norm
from lora.forward.plans.stretches import Stretches
from lora.forward.rmsnorm import MOST_LOW_BYTES, LowRank, rmsnorm, writes_low_rank
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.half_tensors import (
    assert_rounded_once,
    needs_halves,
    rounded,
    typed,
    typed_marked,
)
from tests.support.kernels import MARKER, activation, extent_in_use, run_twice, with_facts

# Fewer quads than lanes, whole and broken steps, as many lanes as a workgroup has.
SHAPES = [(1, 1, 4), (5, 3, 100), (70, 70, 576), (3, 2, 2052), (2, 2, 16384)]


@pytest.mark.parametrize("is_cpu", [True, False], ids=["CPU's lanes", "GPU's lanes"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("rows", "in_use", "width"), SHAPES)
def test_rmsnorm(
    recording: Recording, rows: int, in_use: int, width: int,
    with_residual: bool, is_cpu: bool,
) -> None:  # fmt: skip
    recording = with_facts(recording, is_cpu=is_cpu)  # both run on any device
    rng = np.random.default_rng(width)
    x = rng.normal(size=(rows, width)).astype(np.float32)
    weight = rng.normal(size=width).astype(np.float32)
    extent = recording.memory.extent(rows)
    recording.memory.set_rows(extent, in_use)
    tensor = recording.memory.empty((rows, width), extent=extent)
    recording.memory.write(tensor, x)
    program = Program(recording)
    residual = rng.normal(size=(rows, width)).astype(np.float32)
    past = recording.memory.empty((rows, width), extent=extent)
    recording.memory.write(past, residual)
    y = rmsnorm(
        program,
        tensor,
        Norm(recording.memory.upload(weight), 1e-5),
        residual=past if with_residual else None,
    )
    recording.memory.write(y, np.full((rows, width), -7.0))
    program.run()
    result = recording.memory.read(y)
    expected = rmsnorm_reference(x, weight, 1e-5) + with_residual * residual
    # A sum of `width` squares in f32: a relative error of a few 2^-24 a term, in a tree. The sum
    # with the residual is rounded at the size of its larger term, up to 8.
    np.testing.assert_allclose(
        result[:in_use], expected[:in_use], rtol=2e-6, atol=2e-6 if with_residual else 1e-7
    )
    assert (result[in_use:] == -7.0).all()  # rows that are not in use stay untouched


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("x_type", "out_type"), [("f16", "f32"), ("f32", "f16"), ("f16", "f16")])
def test_rmsnorm_of_halves(
    recording: Recording, x_type: str, out_type: str, with_residual: bool
) -> None:
    needs_halves(recording.facts)
    rng = np.random.default_rng(3)
    x, past = rng.normal(size=(2, 67, 100)).astype(np.float32)
    x = rounded(x, x_type)
    weight = rng.normal(size=100).astype(np.float32)
    extent = extent_in_use(recording, 67, 66)
    out = typed_marked(recording, out_type, extent, 100)
    program = Program(recording)
    rmsnorm(
        program, typed(recording, x, x_type, extent), Norm(recording.memory.upload(weight), 1e-5),
        residual=activation(recording, past, extent) if with_residual else None, out=out,
    )  # fmt: skip
    result = run_twice(program, out)
    expected = rmsnorm_reference(x, weight, 1e-5) + with_residual * past
    # As in test_rmsnorm, and the rounding of the result.
    atol = 2e-6 if with_residual else 1e-7
    assert_rounded_once(result[:66], expected[:66], rtol=2e-6, atol=atol)
    assert (result[66:] == MARKER).all()


def test_beyond_its_largest_number_a_half_is_infinite(recording: Recording) -> None:
    """So that the loss shows it: a silent 65504 would train on with wrong numbers."""
    needs_halves(recording.facts)
    extent = recording.memory.extent(1)
    out = typed_marked(recording, "f16", extent, 4)
    program = Program(recording)
    x = activation(recording, np.array([[1, -1, 1, 1]], np.float32), extent)
    weight = recording.memory.upload(np.array([1e6, 1e6, 1e4, -1e30], np.float32))
    rmsnorm(program, x, Norm(weight, 0.0), out=out)
    assert (run_twice(program, out) == [[np.inf, -np.inf, 1e4, -np.inf]]).all()


@pytest.mark.parametrize("is_cpu", [True, False], ids=["CPU's lanes", "GPU's lanes"])
def test_a_row_does_not_depend_on_the_others(recording: Recording, is_cpu: bool) -> None:
    recording = with_facts(recording, is_cpu=is_cpu)
    x = np.random.default_rng(6).normal(size=(9, 100)).astype(np.float32)
    weight = recording.memory.upload(np.ones(100, np.float32))
    found = []
    for rows in (x, x[4:5]):
        program = Program(recording)
        y = rmsnorm(
            program,
            activation(recording, rows, recording.memory.extent(len(rows))),
            Norm(weight, 1e-5),
        )
        program.run()
        found.append(recording.memory.read(y))
    assert found[0][4].tobytes() == found[1][0].tobytes()


def test_a_width_of_no_whole_vectors_is_refused(recording: Recording) -> None:
    x, weight = (
        recording.memory.empty((2, 6), extent=recording.memory.extent(2)),
        recording.memory.empty((6,)),
    )
    with pytest.raises(ValueError, match="no multiple of 4"):
        rmsnorm(Program(recording), x, Norm(weight, 1e-5))


# Sums fewer than lanes that can share one, and more than these at once; broken turns of quads.
LOW = [(1, 1, 4, 4), (7, 5, 36, 12), (70, 64, 576, 48), (3, 2, 2052, 20)]


@pytest.mark.parametrize("extra", ["plain", "residual", "f16", "stretches", "stretches of f16"])
@pytest.mark.parametrize(("rows", "in_use", "width", "low_width"), LOW)
def test_z_beside_the_norm(
    recording: Recording, rows: int, in_use: int, width: int, low_width: int, extra: str
) -> None:
    """The norm to its bits, and z of what it stores, within f32's sums."""
    recording = with_facts(recording, is_cpu=False)
    halves = "f16" in extra
    if halves:
        needs_halves(recording.facts)
    rng = np.random.default_rng(width)
    extent, memory = extent_in_use(recording, rows, in_use), recording.memory

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    weight, a = normal(width), normal(low_width, width)
    values = [normal(rows, width) for _ in range(3)]
    first = -(-a.size // 64) * 64  # A as a part of a buffer, as adapters have it
    flat = memory.upload(np.concatenate([normal(first), a.reshape(-1)]))
    factor = flat.slice(first, first + a.size).reshape(low_width, width)
    lora = LoraFactors(factor, factor, low_width, 1.0, ((0, 4),))
    found = []
    for with_low in (False, True):
        z = typed_marked(recording, "f32", extent, low_width)
        out = typed_marked(recording, "f16" if halves else "f32", extent, width)
        x, past = (activation(recording, v, extent) for v in values[:2])
        stretches = None
        if "stretches" in extra:
            partial = memory.upload(np.concatenate([values[1], values[2]]))
            stretches = Stretches(partial, 2, past)
        program = Program(recording)
        rmsnorm(
            program, x, Norm(memory.upload(weight), 1e-5), out=out, stretches=stretches,
            residual=past if extra == "residual" else None,
            low=LowRank(lora, z) if with_low else None,
        )  # fmt: skip
        assert len(program.dispatches) == 1
        program.run()
        found.append([memory.read(t) for t in (out, x, z)])
    (y, x_left, untouched), (y_beside, x_beside, z_found) = found
    assert y_beside.tobytes() == y.tobytes() and x_beside.tobytes() == x_left.tobytes()
    assert (untouched == MARKER).all() and (z_found[in_use:] == MARKER).all()
    used = y[:in_use].astype(np.float64)
    bound = 2.0**-24 * (4.0 + 4.0 * np.sqrt(width)) * (np.abs(used) @ np.abs(a).T)
    assert (np.abs(z_found[:in_use] - used @ a.T) <= bound).all()


def test_where_a_norm_writes_z(recording: Recording) -> None:
    gpu = with_facts(recording, is_cpu=False, workgroup_memory=16384)
    a = recording.memory.empty((48, 576))
    lora = LoraFactors(a, a, 16, 1.0, ((0, 576), (576, 768), (768, 960)))
    most = MOST_LOW_BYTES // (4 * a.size)
    assert 128 <= most < 512
    assert writes_low_rank(gpu, most, lora) and not writes_low_rank(gpu, most + 1, lora)
    assert not writes_low_rank(with_facts(gpu, is_cpu=True), 1, lora)
    assert not writes_low_rank(with_facts(gpu, workgroup_memory=8192), 1, lora)
    scaled = replace(lora, member_scales=(1.0, 2.0, 1.0))
    assert not writes_low_rank(gpu, 1, scaled)


# -- as f16, of rows that are scaled ----------------------------------------------------------


@pytest.mark.parametrize("is_cpu", [True, False], ids=["CPU's lanes", "GPU's lanes"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("rows", "in_use", "width"), SHAPES[:-1])
def test_rows_that_are_scaled(
    recording: Recording, rows: int, in_use: int, width: int, with_residual: bool, is_cpu: bool
) -> None:
    """What tiles of f16 make of the same norm in f32, and what they would look for."""
    needs_halves(recording.facts)
    recording = with_facts(recording, is_cpu=is_cpu)
    memory, rng = recording.memory, np.random.default_rng(width)
    x, past = (rng.normal(size=(rows, width)).astype(np.float32) for _ in range(2))
    norm = Norm(memory.upload((1e6 * rng.normal(size=width)).astype(np.float32)), 1e-5)
    extent = extent_in_use(recording, rows, in_use)
    x_t, past_t = (activation(recording, values, extent) for values in (x, past))
    y, halves = (typed_marked(recording, dtype, extent, width) for dtype in ("f32", "f16"))
    sizes = memory.upload(np.full(rows, 7, np.uint32))
    program, residual = Program(recording), past_t if with_residual else None
    rmsnorm(program, x_t, norm, residual=residual, out=y)
    rmsnorm(program, x_t, norm, residual=residual, out=halves, sizes=sizes)
    found = run_twice(program, halves)
    whole = memory.read(y)[:in_use]
    assert np.abs(whole).max() > 65504  # which f16 does not hold
    assert found[:in_use].tobytes() == scaled_halves(whole).tobytes()
    assert (found[in_use:] == MARKER).all()
    largest = memory.read(sizes)
    assert (largest[:in_use].view(np.float32) == np.abs(whole).max(axis=1)).all()
    assert (largest[in_use:] == 7).all()


def test_a_scaled_row_that_is_no_number_stays_none(recording: Recording) -> None:
    needs_halves(recording.facts)
    memory, extent = recording.memory, recording.memory.extent(2)
    x = np.ones((2, 36), np.float32)
    x[1, 30] = np.nan
    halves, sizes = typed_marked(recording, "f16", extent, 36), memory.empty((2,), "u32")
    program, norm = Program(recording), Norm(memory.upload(np.ones(36)), 1e-5)
    rmsnorm(program, activation(recording, x, extent), norm, out=halves, sizes=sizes)
    program.run()
    assert np.isfinite(memory.read(halves)).all(axis=1).tolist() == [True, False]
    assert memory.read(sizes)[0] < 0x7F800000 < memory.read(sizes)[1]


@pytest.mark.parametrize("wrong", ["f32", "f32 sizes", "shape", "stretches"])
def test_sizes_that_go_with_nothing_are_refused(recording: Recording, wrong: str) -> None:
    memory, extent = recording.memory, recording.memory.extent(2)
    x = activation(recording, np.ones((2, 36), np.float32), extent)
    out = memory.empty((2, 36), "f32" if wrong == "f32" else "f16", extent=extent)
    sizes = memory.empty((3 if wrong == "shape" else 2,), "f32" if wrong == "f32 sizes" else "u32")
    stretches = Stretches(memory.empty((4, 36)), 2) if wrong == "stretches" else None
    with pytest.raises(ValueError, match="sizes"):
        rmsnorm(
            Program(recording), x, Norm(memory.upload(np.ones(36)), 1e-5), out=out, sizes=sizes,
            stretches=stretches,
        )  # fmt: skip
