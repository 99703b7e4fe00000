"""Products of a row of whole numbers with matrices of every type, against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from lora.checks.references.matmul import error_bound
from lora.checks.references.matmul_row import gated_reference, normed_row
from lora.checks.references.swiglu import gate_reference
from lora.forward.gguf.quantization import QUANTIZATIONS
from lora.forward.int_row import IntRow, to_int_row
from lora.forward.matmul_int_row import IntRowTiling, choose_int_tiling, matmul_int_row
from lora.forward.matmul_row import project_row
from lora.forward.model.factors import LoraFactors
from lora.forward.model.norm import Norm
from lora.forward.model.weights import FrozenMatrix, load_matrix
from lora.forward.product import Product
from lora.shaders.program import Dispatch, Program
from lora.shaders.recording import Recording
from tests.support.kernels import MARKER, activation, extent_in_use, marked, run_twice, with_facts
from tests.support.one_row import EPSILON, check_int_row, numbers, random_matrix
from tests.support.quantized_tensors import dequantized, random_blocks, tensor_of

KINDS = [kind for kind, q in QUANTIZATIONS.items() if q.numbers is not None]


@pytest.fixture
def recording(recording: Recording) -> Recording:
    """As a GPU."""
    return with_facts(recording, is_cpu=False)


def whole(program: Program, x: np.ndarray, norm: np.ndarray | None = None) -> IntRow:
    """A row on the device, in the form that the products take."""
    recording = program.recording
    extent = extent_in_use(recording, 1, 1)
    row = IntRow.allocate(recording, x.size, extent)
    if norm is not None:
        row = row.before_norm(Norm(recording.memory.upload(norm), EPSILON))
    return to_int_row(program, activation(recording, x, extent), row)


def rounding(v: np.ndarray, w: np.ndarray) -> np.ndarray:
    """What rounding v to whole numbers may add to sums with the rows of w: of random signs.

    A number is off by up to 2^-22 of its block's largest (tests/forward/test_int_row.py).
    """
    largest = np.repeat(np.abs(v.reshape(-1, 32)).max(axis=1), 32)
    return 4 * 2.0**-22 * np.sqrt((largest * w) ** 2 @ np.ones(v.size))


@pytest.mark.parametrize(
    ("kind", "with_norm", "out_features", "blocks"),
    [(kind, True, 104, 9) for kind in KINDS]
    + [(kind, False, 36, 1) for kind in KINDS[:2]]
    + [(kind, False, 4104, 2) for kind in KINDS[-2:]],
    ids=lambda value: getattr(value, "name", None),
)
def test_random_blocks(
    recording: Recording,
    kind: GGMLQuantizationType,
    with_norm: bool,
    out_features: int,
    blocks: int,
) -> None:
    """Outputs that fill no workgroup, blocks that some lanes lack, and many rows of W a lane."""
    columns = QUANTIZATIONS[kind].block_size * blocks
    matrix, w = random_matrix(recording, kind, out_features, columns, seed=blocks)
    rng = np.random.default_rng(blocks)
    x, weight = numbers(rng, 1, columns), numbers(rng, columns) if with_norm else None
    y = marked(recording, extent_in_use(recording, 1, 1), out_features)
    program = Program(recording)
    matmul_int_row(program, Product(whole(program, x, weight), matrix), out=y)
    v = normed_row(x, weight, EPSILON)
    bound = error_bound(np.abs(v) @ np.abs(w).T, columns) + rounding(v, w)
    result = run_twice(program, y)
    assert (np.abs(result - v @ w.T) <= bound).all()
    assert (result != MARKER).all()


@pytest.mark.parametrize(
    ("kind", "tiling"),
    [
        ("Q4_0", IntRowTiling(64, 8, 4, 1)), ("Q4_0", IntRowTiling(256, 16, 2, 4)),
        ("Q4_0", IntRowTiling(64, 2, 2, 3)), ("Q6_K", IntRowTiling(128, 128, 8, 1)),
        ("Q6_K", IntRowTiling(256, 32, 4, 2)), ("Q8_0", IntRowTiling(256, 64, 8, 1)),
        ("Q8_0", IntRowTiling(64, 2, 2, 3)),
    ],
)  # fmt: skip
def test_tilings(recording: Recording, kind: str, tiling: IntRowTiling) -> None:
    """Every division of a product gives the product."""
    matrix, w = random_matrix(recording, GGMLQuantizationType[kind], 72, 2304, seed=3)
    x, weight = numbers(np.random.default_rng(3), 1, 2304), np.ones(2304, np.float32)
    y = marked(recording, extent_in_use(recording, 1, 1), 72)
    program = Program(recording)
    row = whole(program, x, weight)
    matmul_int_row(program, Product(row, matrix), out=y, tiling=tiling)
    v = normed_row(x, weight, EPSILON)
    bound = error_bound(np.abs(v) @ np.abs(w).T, 2304) + rounding(v, w)
    assert (np.abs(run_twice(program, y) - v @ w.T) <= bound).all()


@pytest.mark.parametrize(
    ("kind", "columns", "half", "adapted", "activation_name"),
    [
        ("Q4_0", 96, 4, (), "silu"),
        ("Q4_0", 96, 32, (0, 1), "gelu_tanh"),
        ("Q4_K", 512, 160, (1,), "silu"),
        ("Q4_K", 512, 132, (0,), "gelu_tanh"),
        ("Q8_0", 2080, 32, (0, 1), "silu"),
        ("Q8_0", 2080, 160, (), "gelu_tanh"),
    ],
)
def test_norm_and_gate(
    recording: Recording, kind: str, columns: int, half: int, adapted: tuple[int, ...],
    activation_name: str,
) -> None:  # fmt: skip
    """From the residual stream to what `down` takes, as whole numbers, too, where they fit."""
    matrix, w = random_matrix(recording, GGMLQuantizationType[kind], 2 * half, columns, seed=7)
    rng, rank, scale = np.random.default_rng(columns), 8, 1.5
    x = numbers(rng, 1, columns) * 3
    weight = numbers(rng, columns) / np.float32(np.abs(w).max() * np.sqrt(columns))
    bias = numbers(rng, 2 * half)
    a = numbers(rng, len(adapted) * rank, columns)
    b = numbers(rng, len(adapted) * half, rank)
    extent = extent_in_use(recording, 1, 1)
    program = Program(recording)
    row = whole(program, x, weight)
    lora, z = None, None
    if adapted:
        ranges = tuple((member * half, (member + 1) * half) for member in adapted)
        lora = LoraFactors(
            recording.memory.upload(a), recording.memory.upload(b), rank, scale, ranges
        )
        norm = Norm(recording.memory.upload(weight), EPSILON)
        z = project_row(program, activation(recording, x, extent), lora, norm=norm)
    y = marked(recording, extent, half)
    int_out = IntRow.allocate(recording, half, extent) if half % 32 == 0 else None
    matmul_int_row(
        program,
        Product(
            row, matrix, gate=activation_name, lora=lora, z=z, bias=recording.memory.upload(bias)
        ),
        out=y,
        int_out=int_out,
    )
    result = run_twice(program, y)

    v = normed_row(x, weight, EPSILON)
    gate, up, magnitude = gated_reference(v, w, bias, a, b, adapted, scale)
    expected = gate_reference(gate, activation_name) * up
    # The gate's error passes a slope of at most 1.13; exp is good to some 2^-21 of its value.
    bound = error_bound(magnitude, columns + rank) + rounding(v, w)
    bound = 1.13 * bound[:half] * np.abs(up) + bound[half:] * np.abs(gate) + 2.0**-20 * np.abs(up)
    assert (np.abs(result - expected) <= bound + 2.0**-20 * np.abs(expected)).all()
    if int_out is not None:
        stored = result[0].astype(np.float64)
        check_int_row(recording.memory.read(int_out.words), stored, stored, error=2.0**-24)


def stacked(
    recording: Recording, sizes: list[int], columns: int
) -> tuple[FrozenMatrix, np.ndarray]:
    """A matrix of several tensors of two types (two parts), and what it decodes to."""
    kinds = [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q8_0]
    tensors = [
        tensor_of(kind, random_blocks(kind, n, columns, seed=n), columns)
        for kind, n in zip(kinds, sizes, strict=True)
    ]
    return load_matrix(recording, tensors), np.concatenate([dequantized(t) for t in tensors])


@pytest.mark.parametrize(
    ("rank", "adapted", "softcap", "sizes"),
    [
        (4, (0, 2), None, [36, 8, 20]),
        (40, (1,), 3.0, [36, 8, 20]),
        (4, (1,), 3.0, [64, 32, 32]),
        (40, (0, 2), None, [64, 32, 32]),
    ],
)
def test_adapters_bias_cap_and_residual(
    recording: Recording,
    rank: int,
    adapted: tuple[int, ...],
    softcap: float | None,
    sizes: list[int],
) -> None:
    """Some members of a stacked matrix of two parts are adapted, and the row goes on normed."""
    columns, scale = 96, 1.5
    matrix, w = stacked(recording, sizes, columns)
    assert len(matrix.parts) == 2
    rng = np.random.default_rng(rank)
    starts = np.cumsum([0, *sizes])
    ranges = tuple((int(starts[i]), int(starts[i + 1])) for i in adapted)
    n_out = sum(sizes)
    x, residual = numbers(rng, 1, columns), numbers(rng, 1, n_out)
    z, following = numbers(rng, 1, len(adapted) * rank), numbers(rng, n_out)
    b, bias = numbers(rng, sum(sizes[i] for i in adapted), rank), numbers(rng, n_out)
    extent = extent_in_use(recording, 1, 1)
    a = recording.memory.empty((len(adapted) * rank, columns))
    lora = LoraFactors(a, recording.memory.upload(b), rank, scale, ranges)
    y = marked(recording, extent, n_out)
    int_out = None
    if n_out % 32 == 0:
        int_out = IntRow.allocate(recording, n_out, extent).before_norm(
            Norm(recording.memory.upload(following), EPSILON)
        )
    program = Program(recording)
    matmul_int_row(
        program,
        Product(
            whole(program, x),
            matrix,
            lora=lora,
            z=activation(recording, z, extent),
            bias=recording.memory.upload(bias),
            softcap=softcap,
            residual=activation(recording, residual, extent),
        ),
        out=y,
        int_out=int_out,
    )
    result = run_twice(program, y)

    exact = x.astype(np.float64)
    product = exact @ w.T + bias
    magnitude = np.abs(x) @ np.abs(w).T + np.abs(bias)
    first = 0
    for index, (start, stop) in enumerate(ranges):
        low = z[:, index * rank : (index + 1) * rank].astype(np.float64)
        factor = b[first : first + stop - start]
        product[:, start:stop] += scale * low @ factor.T
        magnitude[:, start:stop] += scale * np.abs(low) @ np.abs(factor).T
        first += stop - start
    bound = error_bound(magnitude, columns + rank) + rounding(exact, w)
    if softcap is not None:
        product = softcap * np.tanh(product / softcap)
        bound += 1e-5 * softcap  # WGSL's tanh: 2^-11 at worst, drivers seen stay below 2^-18
    expected = product + residual
    assert (np.abs(result - expected) <= bound + 2.0**-23 * np.abs(expected)).all()
    if int_out is not None:
        stored = result[0].astype(np.float64)
        check_int_row(
            recording.memory.read(int_out.words), stored * following, stored, error=2.0**-24
        )


@pytest.mark.parametrize(
    ("columns", "contraction", "most_lanes"),
    [(96, 576, 256), (64, 4096, 1024), (2080, 64, 256), (2080, 64, 1024)],
)
def test_the_row_that_comes_out(
    recording: Recording, columns: int, contraction: int, most_lanes: int
) -> None:
    """In one dispatch, with the lanes that WebGPU promises and with as many as devices have."""
    recording = with_facts(recording, most_lanes=min(most_lanes, recording.facts.most_lanes))
    matrix, _ = random_matrix(recording, GGMLQuantizationType.Q4_1, columns, contraction, seed=1)
    rng = np.random.default_rng(columns)
    x, following = numbers(rng, 1, contraction), numbers(rng, columns)
    extent = extent_in_use(recording, 1, 1)
    y = marked(recording, extent, columns)
    int_out = IntRow.allocate(recording, columns, extent).before_norm(
        Norm(recording.memory.upload(following), EPSILON)
    )
    program = Program(recording)
    row = whole(program, x)
    matmul_int_row(program, Product(row, matrix), out=y, int_out=int_out)
    assert len(program.commands) == 2  # whole numbers of x, and the product
    stored = run_twice(program, y)[0].astype(np.float64)
    check_int_row(recording.memory.read(int_out.words), stored * following, stored, error=2.0**-24)


def test_within_the_buffers_that_webgpu_promises(recording: Recording) -> None:
    """An adapter, a bias, a residual and the row that comes out, normed: nine buffers, or eight."""
    recording = with_facts(recording, most_storage_buffers=8)
    rng, columns, rank = np.random.default_rng(0), 64, 4
    matrix, _ = random_matrix(recording, GGMLQuantizationType.Q8_0, columns, 32, seed=1)
    extent = extent_in_use(recording, 1, 1)
    x, following, z = numbers(rng, 1, 32), numbers(rng, columns), numbers(rng, 1, rank)
    b = recording.memory.upload(numbers(rng, columns, rank))
    lora = LoraFactors(recording.memory.empty((rank, 32)), b, rank, 1.0, ((0, columns),))
    y = marked(recording, extent, columns)
    int_out = IntRow.allocate(recording, columns, extent).before_norm(
        Norm(recording.memory.upload(following), EPSILON)
    )
    program = Program(recording)
    matmul_int_row(
        program,
        Product(
            whole(program, x),
            matrix,
            lora=lora,
            z=activation(recording, z, extent),
            bias=recording.memory.upload(numbers(rng, columns)),
            residual=activation(recording, numbers(rng, 1, columns), extent),
        ),
        out=y,
        int_out=int_out,
    )
    assert max(len(c.tensors) for c in program.commands if isinstance(c, Dispatch)) <= 8
    stored = run_twice(program, y)[0].astype(np.float64)
    check_int_row(recording.memory.read(int_out.words), stored * following, stored, error=2.0**-24)


@pytest.mark.parametrize("contraction", [32, 128, 576, 1536, 2048, 4096, 8192, 14336])
@pytest.mark.parametrize("columns", [4, 36, 576, 2048, 16384, 128256])
@pytest.mark.parametrize("most_lanes", [128, 256, 512, 1024])
@pytest.mark.parametrize(("gated", "stores"), [(0, 0), (0, 1), (1, 1)])
def test_every_lane_has_its_place(
    columns: int, contraction: int, most_lanes: int, gated: bool, stores: bool
) -> None:
    tiling = choose_int_tiling(
        columns, contraction, most_lanes=most_lanes, gated=gated, stores=stores
    )
    assert tiling.lanes <= most_lanes and tiling.lanes % tiling.share == 0
    assert tiling.share >= tiling.weight_rows  # or the sums of a workgroup are more than its lanes
    if stores and not gated:
        assert tiling.lanes // tiling.share * tiling.weight_rows % 32 == 0


def test_what_the_kernel_cannot_do_is_refused(recording: Recording) -> None:
    matrix, _ = stacked(recording, [32, 32, 32], 32)
    extent = extent_in_use(recording, 1, 1)
    row = IntRow.allocate(recording, 64, extent)
    with pytest.raises(ValueError, match="an int row of 64 does not fit"):
        matmul_int_row(Program(recording), Product(row, matrix))
    row = IntRow.allocate(recording, 32, extent)
    with pytest.raises(ValueError, match="a gate takes one part"):
        matmul_int_row(Program(recording), Product(row, matrix, gate="silu"))
    with pytest.raises(ValueError, match="cannot hold 96 columns"):
        matmul_int_row(Program(recording), Product(row, matrix), int_out=row)
    recording = with_facts(recording, is_cpu=True)
    with pytest.raises(ValueError, match="does not fit"):
        matmul_int_row(Program(recording), Product(row, matrix))
