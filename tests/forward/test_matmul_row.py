"""Products of one row with matrices of every tensor type, against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from lora.checks.references.matmul import error_bound
from lora.checks.references.matmul_row import gated_reference, normed_row
from lora.checks.references.swiglu import gate_reference
from lora.forward.gguf.quantization import QUANTIZATIONS
from lora.forward.matmul_row import RowTiling, choose_tiling, matmul_row, project_row
from lora.forward.model.factors import LoraFactors
from lora.forward.model.norm import Norm
from lora.forward.model.weights import FrozenMatrix, load_matrix
from lora.forward.product import Product
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import MARKER, activation, extent_in_use, marked, run_twice, with_facts
from tests.support.one_row import EPSILON, numbers, random_matrix
from tests.support.quantized_tensors import (
    ALL_TYPES,
    dequantized,
    random_blocks,
    tensor_of,
)


@pytest.fixture(params=[True, False], ids=["cpu", "gpu"])
def lanes(request: pytest.FixtureRequest) -> bool:
    """With one lane a sum, and with lanes that share it, on whatever device there is."""
    return bool(request.param)


@pytest.fixture
def recording(request: pytest.FixtureRequest, recording: Recording) -> Recording:
    """With the lanes that a test asks for."""
    if "lanes" not in request.fixturenames:
        return recording
    return with_facts(recording, is_cpu=request.getfixturevalue("lanes"))


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize(
    ("kind", "with_norm", "out_features", "blocks"),
    [(kind, True, 104, 9) for kind in ALL_TYPES]
    # Of each size of a block one without a norm.
    + [(GGMLQuantizationType[name], False, 36, 1) for name in ("BF16", "Q4_1", "Q6_K")],
    ids=lambda value: getattr(value, "name", None),
)
def test_random_blocks(
    recording: Recording,
    kind: GGMLQuantizationType,
    with_norm: bool,
    out_features: int,
    blocks: int,
) -> None:
    """Outputs that fill no workgroup; widths that fill no step, where the type has such."""
    block_size = QUANTIZATIONS[kind].block_size
    columns = 32 * blocks + 4 if block_size == 1 else block_size * blocks
    matrix, w = random_matrix(recording, kind, out_features, columns, seed=blocks)
    rng = np.random.default_rng(blocks)
    x, weight = numbers(rng, 1, columns), numbers(rng, columns) if with_norm else None
    extent = extent_in_use(recording, 1, 1)
    y = marked(recording, extent, out_features)
    program = Program(recording)
    norm = None if weight is None else Norm(recording.memory.upload(weight), EPSILON)
    matmul_row(program, Product(activation(recording, x, extent), matrix, norm=norm), out=y)
    v = normed_row(x, weight, EPSILON)
    magnitude = np.abs(v) @ np.abs(w).T
    result = run_twice(program, y)
    assert (np.abs(result - v @ w.T) <= error_bound(magnitude, columns)).all()
    assert (result != MARKER).all()


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize(
    ("kind", "columns", "out_features", "adapted", "activation_name"),
    [
        ("F32", 100, 8, (), "silu"),
        ("Q4_0", 96, 40, (0, 1), "gelu_tanh"),
        ("Q4_K", 512, 264, (1,), "silu"),
        ("Q8_0", 2080, 40, (0,), "gelu_tanh"),
    ],
)
def test_norm_and_gate(
    recording: Recording,
    kind: str,
    columns: int,
    out_features: int,
    adapted: tuple[int, ...],
    activation_name: str,
) -> None:
    """The whole way from the residual stream to what `down` takes, adapter and biases included."""
    matrix, w = random_matrix(recording, GGMLQuantizationType[kind], out_features, columns, seed=7)
    rng, half, rank, scale = np.random.default_rng(columns), out_features // 2, 8, 1.5
    # Sums of a size for which the activations bend; weights of random blocks come in any.
    x = numbers(rng, 1, columns) * 3
    weight = numbers(rng, columns) / np.float32(np.abs(w).max() * np.sqrt(columns))
    bias = numbers(rng, out_features)
    a = numbers(rng, len(adapted) * rank, columns)
    b = numbers(rng, len(adapted) * half, rank)
    extent = extent_in_use(recording, 1, 1)
    norm = Norm(recording.memory.upload(weight), EPSILON)
    row = activation(recording, x, extent)
    program = Program(recording)
    lora, z = None, None
    if adapted:
        ranges = tuple((member * half, (member + 1) * half) for member in adapted)
        lora = LoraFactors(
            recording.memory.upload(a), recording.memory.upload(b), rank, scale, ranges
        )
        z = project_row(program, row, lora, norm=norm)
    y = marked(recording, extent, half)
    matmul_row(
        program,
        Product(
            row,
            matrix,
            norm=norm,
            gate=activation_name,
            lora=lora,
            z=z,
            bias=recording.memory.upload(bias),
        ),
        out=y,
    )
    result = run_twice(program, y)

    v = normed_row(x, weight, EPSILON)
    gate, up, magnitude = gated_reference(v, w, bias, a, b, adapted, scale)
    expected = gate_reference(gate, activation_name) * up
    # The gate's error passes a slope of at most 1.13; exp is good to some 2^-21 of its value.
    bound = error_bound(magnitude, columns + rank)
    bound = 1.13 * bound[:half] * np.abs(up) + bound[half:] * np.abs(gate) + 2.0**-20 * np.abs(up)
    assert (np.abs(result - expected) <= bound + 2.0**-20 * np.abs(expected)).all()


@pytest.mark.parametrize("lanes", [False], indirect=True)  # one lane a sum has no such choice
@pytest.mark.parametrize(
    ("contraction", "columns", "shape"),
    [
        (2048, 20, (128, 1, 2, 0, 0)),
        (4100, 20, (256, 1, 2, 0, 1)),  # half an eight is left
        (8192, 20, (256, 1, 4, 0, 0)),
        (8192, 1024, (256, 2, 4, 0, 0)),  # no choice of a device's: another tiling is given
        (14336, 20, (256, 1, 7, 3, 0)),
        (18464, 20, (256, 1, 9, 1, 4)),
        (18468, 20, (256, 1, 9, 1, 5)),
    ],
)
def test_long_contractions(
    recording: Recording,
    lanes: None,
    contraction: int,
    columns: int,
    shape: tuple[int, int, int, int, int],
) -> None:
    """Rounds of several eights, the rest of them, and eights (`last`) that some lanes have."""
    share, quads, eights, rest, last = shape
    tiling = choose_tiling(False, columns, contraction)
    if quads == 2:
        tiling = RowTiling(256, share, quads, 2)
    assert (tiling.share, tiling.quads, contraction // 8 // share) == (share, quads, eights)
    assert eights % tiling.steps == rest
    assert -(-contraction // 8) % share == last
    matrix, w = random_matrix(recording, GGMLQuantizationType.F16, columns, contraction, seed=1)
    x = numbers(np.random.default_rng(contraction), 1, contraction)
    extent = extent_in_use(recording, 1, 1)
    y = marked(recording, extent, columns)
    program = Program(recording)
    given = tiling if quads == 2 else None
    matmul_row(program, Product(activation(recording, x, extent), matrix), out=y, tiling=given)
    bound = error_bound(np.abs(x) @ np.abs(w).T, contraction)
    assert (np.abs(run_twice(program, y) - x @ w.T) <= bound).all()


def stacked(
    recording: Recording, out_features: list[int], columns: int
) -> tuple[FrozenMatrix, ...]:
    """A matrix of several tensors of two types (two parts), and what it decodes to."""
    kinds = [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q8_0]
    tensors = [
        tensor_of(kind, random_blocks(kind, n, columns, seed=n), columns)
        for kind, n in zip(kinds, out_features, strict=True)
    ]
    return load_matrix(recording, tensors), np.concatenate([dequantized(t) for t in tensors])


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize(
    ("rank", "adapted", "softcap"),
    [(4, (0, 2), None), (16, (1,), 3.0), (40, (0, 1, 2), None), (4, (0, 1, 2), 3.0)],
)
def test_adapters_bias_cap_and_residual(
    recording: Recording, rank: int, adapted: tuple[int, ...], softcap: float | None
) -> None:
    """Some members of a stacked matrix are adapted, across its parts."""
    columns, sizes, scale = 96, [36, 8, 20], 1.5
    matrix, w = stacked(recording, sizes, columns)
    assert len(matrix.parts) == 2
    rng = np.random.default_rng(rank)
    starts = np.cumsum([0, *sizes])
    ranges = tuple((int(starts[i]), int(starts[i + 1])) for i in adapted)
    n_out = sum(sizes)
    x, residual = numbers(rng, 1, columns), numbers(rng, 1, n_out)
    z = numbers(rng, 1, len(adapted) * rank)
    b, bias = numbers(rng, sum(sizes[i] for i in adapted), rank), numbers(rng, n_out)
    extent = extent_in_use(recording, 1, 1)
    lora = LoraFactors(
        recording.memory.empty((len(adapted) * rank, columns)),
        recording.memory.upload(b),
        rank,
        scale,
        ranges,
    )
    y = marked(recording, extent, n_out)
    program = Program(recording)
    matmul_row(
        program,
        Product(
            activation(recording, x, extent),
            matrix,
            lora=lora,
            z=activation(recording, z, extent),
            bias=recording.memory.upload(bias),
            softcap=softcap,
            residual=activation(recording, residual, extent),
        ),
        out=y,
    )
    result = run_twice(program, y)

    product = x.astype(np.float64) @ w.T + bias
    magnitude = np.abs(x) @ np.abs(w).T + np.abs(bias)
    first = 0
    for index, (start, stop) in enumerate(ranges):
        low = z[:, index * rank : (index + 1) * rank].astype(np.float64)
        factor = b[first : first + stop - start]
        product[:, start:stop] += scale * low @ factor.T
        magnitude[:, start:stop] += scale * np.abs(low) @ np.abs(factor).T
        first += stop - start
    bound = error_bound(magnitude, columns + rank)
    if softcap is not None:
        product = softcap * np.tanh(product / softcap)
        bound += 1e-5 * softcap  # WGSL's tanh: 2^-11 at worst, drivers seen stay below 2^-18
    expected = product + residual
    assert (np.abs(result - expected) <= bound + 2.0**-23 * np.abs(expected)).all()


@pytest.mark.parametrize(
    ("members", "width", "with_norm", "most_lanes"),
    [
        (1, 100, False, 256),
        (3, 576, True, 1024),
        (2, 4100, False, 1024),
        (2, 4100, True, 256),
        (1, 14336, True, 1024),
    ],
)
def test_project_row(
    recording: Recording, members: int, width: int, with_norm: bool,
    most_lanes: int,
) -> None:  # fmt: skip
    """With the lanes that WebGPU promises and with more; the norm's weight, not its division."""
    recording = with_facts(recording, most_lanes=min(most_lanes, recording.facts.most_lanes))
    rng, rank = np.random.default_rng(width), 8
    x, weight = numbers(rng, 1, width), numbers(rng, width)
    a = numbers(rng, members * rank, width)
    ranges = tuple((4 * m, 4 * m + 4) for m in range(members))
    b = recording.memory.empty((4 * members, rank))
    lora = LoraFactors(recording.memory.upload(a), b, rank, 1.0, ranges)
    extent = extent_in_use(recording, 1, 1)
    z = marked(recording, extent, members * rank)
    norm = Norm(recording.memory.upload(weight), EPSILON) if with_norm else None
    program = Program(recording)
    project_row(program, activation(recording, x, extent), lora, norm=norm, out=z)
    v = x.astype(np.float64) * (weight if with_norm else 1.0)
    bound = error_bound(np.abs(v) @ np.abs(a).T, width)
    assert (np.abs(run_twice(program, z) - v @ a.astype(np.float64).T) <= bound).all()


@pytest.mark.parametrize("contraction", [4, 32, 128, 576, 1536, 2048, 4096, 8192, 14336])
@pytest.mark.parametrize("columns", [4, 576, 2048, 16384, 128256])
@pytest.mark.parametrize("gated", [False, True])
def test_lanes_have_work(gated: bool, columns: int, contraction: int) -> None:
    """A GPU's lanes: two eights each where the contraction has them, and all loads in use."""
    tiling = choose_tiling(False, columns, contraction, gated=gated)
    assert tiling.share in (8, 16, 32, 64, 128, 256)
    assert tiling.lanes % tiling.share == 0
    assert tiling.share == 8 or contraction >= 16 * tiling.share
    assert tiling.steps == 1 or 8 * tiling.share * tiling.steps <= contraction
    assert tiling.steps * tiling.quads <= 4  # a lane's registers hold what it loads at once
    assert tiling.quads == 2 or not gated


def test_what_the_kernel_cannot_do_is_refused(recording: Recording) -> None:
    matrix, _ = stacked(recording, [4, 4, 4], 32)
    x = activation(recording, np.zeros((2, 32), np.float32), extent_in_use(recording, 2, 1))
    with pytest.raises(ValueError, match="matmul_row input has shape"):
        matmul_row(Program(recording), Product(x, matrix))
    extent = extent_in_use(recording, 1, 1)
    x = activation(recording, np.zeros((1, 36), np.float32), extent)
    with pytest.raises(ValueError, match="matmul_row input has shape"):
        matmul_row(Program(recording), Product(x, matrix))
    x = activation(recording, np.zeros((1, 32), np.float32), extent)
    with pytest.raises(ValueError, match="a gate takes one part"):
        matmul_row(Program(recording), Product(x, matrix, gate="silu"))
