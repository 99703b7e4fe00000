"""The gated delta rule on matrix units against float64; in plain WGSL without such units."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from lora.backward.gated_delta import KEY, QUERY, VALUE, DeltaGradients, gated_delta_backward
from lora.checks.kernels.recurrent import (
    SIZES,
    STARTS,
    check_gated_delta,
    check_gated_delta_backward,
    random_inputs,
)
from lora.checks.references.gated_delta import (
    DeltaInputs,
    gated_delta_backward_reference,
    gated_delta_reference,
)
from lora.checks.tensors import activation, extent_in_use, normal
from lora.forward.delta_matrix import CHUNK, delta_cut, workgroup_bytes
from lora.forward.gated_delta import DeltaSizes, DeltaTensors, gated_delta, gated_delta_text
from lora.forward.matmul_matrix import EMULATED
from lora.shaders.memory import CountingMemory
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.webgpu import MatrixShape
from tests.support.attention_cuts import on_matrix_units
from tests.support.kernels import with_facts
from tests.support.renderings import MATRIX_GPU

LARGER = DeltaSizes(1, 4, 64)  # two halves of W and q, two slices of k; 28 KiB of workgroup memory
CASES = [
    (SIZES, STARTS),
    (SIZES, (0, 64, 1000)),
    (DeltaSizes(4, 12, 48), (0, 1, 130)),
    (LARGER, (0, 5, 150, 214, 300)),
]


def on_units(recording: Recording, sizes: DeltaSizes, *, on_software: bool = False) -> Recording:
    """As f16 training of a GPU has it there."""
    recording = with_facts(on_matrix_units(recording, on_software=on_software), is_cpu=False)
    if delta_cut(recording, CHUNK, sizes.head_size) is None:
        pytest.skip("too little workgroup memory")
    return recording


@pytest.mark.parametrize(("sizes", "starts"), CASES, ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_against_float64(
    recording: Recording, sizes: DeltaSizes, starts: tuple[int, ...], backward: bool
) -> None:
    check = check_gated_delta_backward if backward else check_gated_delta
    result = check(on_units(recording, sizes), sizes, starts)
    assert result.passed, result


@pytest.mark.parametrize("backward", [False, True])
def test_on_any_driver(recording: Recording, backward: bool) -> None:
    """Also by software that has units."""
    check = check_gated_delta_backward if backward else check_gated_delta
    result = check(on_units(recording, SIZES, on_software=True), SIZES, (0, 3, 75))
    assert result.passed, result


def _run(recording: Recording, x: DeltaInputs, d_o: np.ndarray) -> dict[str, np.ndarray]:
    """What comes out, and all gradients."""
    rows = len(x.v)
    extent = extent_in_use(recording, rows, rows)
    tensors = DeltaTensors.allocate(recording, SIZES, extent)
    parts = [part.reshape(rows, -1) for part in (x.q, x.k, x.v, x.g, x.beta)]
    recording.memory.write(tensors.inputs, np.concatenate(parts, axis=1).astype(np.float32))
    ends = np.searchsorted(x.starts, x.starts, side="right")
    bounds = np.stack([x.starts, ends], axis=1).astype(np.uint32)
    segments = activation(recording, bounds, extent)
    gradients = DeltaGradients.allocate(recording, SIZES, extent)
    given = np.zeros(gradients.d_deltas.shape, np.float32)
    given[:, : SIZES.value_size] = d_o.reshape(rows, -1)
    recording.memory.write(gradients.d_deltas, given)
    program = Program(recording)
    gated_delta(program, tensors, SIZES, segments)
    gated_delta_backward(program, tensors, SIZES, segments, gradients)
    program.run()
    out = recording.memory.read(tensors.deltas)[:, : SIZES.value_size]
    of_parts = recording.memory.read(gradients.d_deltas).reshape(rows, 7, -1)
    d_gates = recording.memory.read(gradients.d_gates)
    names = {"d_q": QUERY, "d_k": KEY, "d_v": VALUE}
    return {"out": out, "d_gates": d_gates, **{k: of_parts[:, at] for k, at in names.items()}}


def test_an_example_gives_the_same_bits_wherever_it_lies_and_whenever(recording: Recording) -> None:
    recording = on_units(recording, SIZES)
    x = random_inputs(SIZES, (0, 37, 170, 190))
    d_o, here = normal(3, *x.v.shape), slice(37, 170)
    among, again = (_run(recording, x, d_o) for _ in range(2))
    parts = (part[here] for part in (x.q, x.k, x.v, x.g, x.beta))
    alone = _run(recording, DeltaInputs(*parts, np.zeros(133, int)), d_o[here])
    for name, found in among.items():
        assert found.tobytes() == again[name].tobytes(), name
        assert found[here].tobytes() == alone[name].tobytes(), name


@pytest.mark.parametrize("power", [-30, 24])
def test_how_large_values_and_gradients_are_changes_no_bit(
    recording: Recording, power: int
) -> None:
    """Far above and below f16's numbers: a power of two goes through all of it."""
    recording = on_units(recording, SIZES)
    x = random_inputs(SIZES, (0, 70, 140))
    d_o, factor = normal(3, *x.v.shape), np.float32(2.0**power)
    usual = _run(recording, x, d_o)
    of_values = _run(recording, replace(x, v=factor * x.v), d_o)
    assert (of_values["out"] == factor * usual["out"]).all()
    assert (of_values["d_v"] == usual["d_v"]).all()
    of_gradients = _run(recording, x, factor * d_o)
    for name, found in of_gradients.items():
        assert (found == (usual[name] if name == "out" else factor * usual[name])).all(), name


def _rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float64)


def _all_of(x: DeltaInputs, d_o: np.ndarray) -> dict[str, np.ndarray]:
    """What `_run` gives, in f64."""
    out, d, rows = gated_delta_reference(x)[0], gated_delta_backward_reference(x, d_o), len(d_o)
    d_gates = np.concatenate([d.g, d.beta], axis=1)
    wide = {"out": out, "d_q": d.q, "d_k": d.k, "d_v": d.v}
    return {name: part.reshape(rows, -1) for name, part in wide.items()} | {"d_gates": d_gates}


@pytest.mark.parametrize(("spread", "beta"), [(0.05, 0.98), (0.3, 0.5)])
def test_keys_that_are_alike(recording: Recording, spread: float, beta: float) -> None:
    """Rows that replace each other's values amplify errors: those of the inputs just as well.

    What f16 makes of q, k and v, which f16 training gives the rule, is off by half as much.
    """
    recording = on_units(recording, SIZES)
    x, d_o = random_inputs(SIZES, (0, 150)), normal(3, 150, 4, 16)
    k = np.ones_like(x.k) + spread * normal(1, *x.k.shape)
    k = (k / np.linalg.norm(k, axis=-1, keepdims=True)).astype(np.float32)
    hard = replace(x, k=k, g=np.full_like(x.g, -1e-3), beta=np.full_like(x.beta, beta))
    expected = _all_of(hard, d_o)
    of_inputs = replace(hard, q=_rounded(x.q), k=_rounded(k), v=_rounded(x.v))
    beyond = _all_of(of_inputs, _rounded(d_o))
    for name, found in _run(recording, hard, d_o).items():
        off, near = (np.sqrt(np.mean((y - expected[name]) ** 2)) for y in (found, beyond[name]))
        assert off < 3 * near, name


def test_numbers_that_are_not_finite_stay_so(recording: Recording) -> None:
    """A step with such gradients is skipped: it must be seen."""
    recording = on_units(recording, SIZES)
    x = random_inputs(SIZES, (0, 70))
    for value in (np.inf, np.nan):
        d_o = normal(3, *x.v.shape)
        d_o[20, 1, 3] = value
        found = _run(recording, x, d_o)
        assert not np.isfinite(found["d_v"].reshape(70, 4, 16)[20, 1]).all()
        assert np.isfinite(found["out"]).all()


NAMES = [
    "delta_matrix_prepare", "delta_matrix_walk", "delta_matrix_walk_backward",
    "delta_matrix_states_backward", "delta_matrix_chunk_backward",
]  # fmt: skip


def _templates(recording: Recording, sizes: DeltaSizes) -> list[str]:
    extent = recording.memory.extent(70)
    tensors = DeltaTensors.allocate(recording, sizes, extent)
    segments = recording.memory.empty((70, 2), "u32", extent=extent)
    program = Program(recording)
    gated_delta(program, tensors, sizes, segments)
    gradients = DeltaGradients.allocate(recording, sizes, extent)
    gated_delta_backward(program, tensors, sizes, segments, gradients)
    return [dispatch.template for dispatch in program.dispatches]


SMALL = MatrixShape(8, 8, 8, "f16", "f32", 32, 32)


@pytest.fixture
def counting() -> Recording:
    """Of a GPU with matrix units that nobody needs to have."""
    return Recording(MATRIX_GPU.facts, CountingMemory(MATRIX_GPU.facts))


def test_where_units_take_it(counting: Recording) -> None:
    half, sizes = replace(counting, precision="f16"), DeltaSizes(16, 32, 128)
    assert _templates(half, sizes) == NAMES
    plain = [name.replace("_matrix", "") for name in NAMES if "states" not in name]
    assert _templates(counting, sizes) == plain  # f32 keeps its bits
    assert _templates(replace(half, body="tiled"), sizes) == plain
    assert _templates(with_facts(half, matrix_shapes=()), sizes) == plain
    assert _templates(with_facts(half, most_lanes=128), sizes) == plain
    assert _templates(with_facts(half, workgroup_memory=32768), sizes) == plain
    assert _templates(half, DeltaSizes(4, 4, 20)) == plain  # no whole fragments
    assert _templates(half, DeltaSizes(4, 4, 8)) == plain
    assert _templates(with_facts(half, matrix_shapes=(SMALL,)), sizes) == NAMES
    assert _templates(with_facts(half, matrix_shapes=(SMALL,)), DeltaSizes(4, 4, 24)) == plain


def test_text_is_left_to_the_plain_kernels(counting: Recording) -> None:
    half = replace(counting, precision="f16")
    extent = half.memory.extent(70)
    tensors, program = DeltaTensors.allocate(half, SIZES, extent), Program(half)
    positions = half.memory.empty((70,), "u32", extent=extent)
    gated_delta_text(program, tensors, SIZES, positions, half.memory.empty(SIZES.state_shape))
    assert [d.template for d in program.dispatches] == ["delta_prepare", "delta_walk"]


@pytest.mark.parametrize("shape", [EMULATED, SMALL])
@pytest.mark.parametrize("head_size", [16, 32, 48, 64, 80, 96, 112, 128])
def test_workgroup_memory_is_what_templates_take(
    counting: Recording, head_size: int, shape: MatrixShape
) -> None:
    recording = with_facts(counting, matrix_shapes=(shape,), workgroup_memory=1 << 20)
    recording = replace(recording, precision="f16")
    sizes, taken = DeltaSizes(2, 4, head_size), []
    extent = recording.memory.extent(70)
    tensors, program = DeltaTensors.allocate(recording, sizes, extent), Program(recording)
    segments = recording.memory.empty((70, 2), "u32", extent=extent)
    gated_delta(program, tensors, sizes, segments)
    gated_delta_backward(
        program, tensors, sizes, segments, DeltaGradients.allocate(recording, sizes, extent)
    )
    words = {"f32": 4, "u32": 4, "atomic<u32>": 4, "vec4<u32>": 16}
    for dispatch in program.dispatches:
        constants = {"chunk": CHUNK, "lanes": dispatch.constants["lanes"]}
        found = re.findall(r"var<workgroup> \w+: array<([\w<]+>?), (\w+)>;", dispatch.code)
        assert len(found) == dispatch.code.count("var<workgroup>")
        taken.append(sum(words[kind] * int(constants.get(n, n)) for kind, n in found))
    most = workgroup_bytes(head_size, shape.n, shape.k)
    assert max(taken) <= most < max(taken) + 5120  # odd heads leave a part of a tile unused
