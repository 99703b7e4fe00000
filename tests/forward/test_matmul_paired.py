"""Products in f32 on matrix units, as pairs of f16: on such where there are, else in plain WGSL.

Errors are against float64, beside those of the plain body.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from lora.backward.matmul import matmul_backward
from lora.forward.matmul import matmul
from lora.forward.matmul_paired import carry_of
from lora.forward.model.factors import LoraFactors
from lora.forward.model.weights import load_matrix
from lora.forward.plans.matmul_plans import Request, noting
from lora.forward.plans.matmul_tiles import PAIRED_TILES, TILES, PairedTile, Plan, Tile, cut
from lora.forward.product import Product
from lora.shaders.memory import CountingMemory
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import extent_in_use, run_twice
from tests.support.matrix_products import Case, check, check_tiles_fit, with_tile
from tests.support.quantized_tensors import (
    ALL_TYPES,
    dequantized,
    random_blocks,
    tensor_of,
    type_name,
)
from tests.support.renderings import LARGE_GPU, MATRIX_GPU, SMALL_MATRICES, Kind

Q8_0, F16, F32 = (GGMLQuantizationType[name] for name in ("Q8_0", "F16", "F32"))
SMALL, SMALLEST = PAIRED_TILES[-1], PairedTile(32, 32, 16, 32, 16)
LONG = 14336  # of Llama 8B's down_proj, the longest contraction of a layer that is common


# -- all that a product may have -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "splits"),
    [
        (Case(33, 32, 68, 100, ranges=((8, 44),), parts=(F32,), bias=True, residual=True), 2),
        (Case(20, 19, 36, 64, rank=20, ranges=((4, 32),), parts=(Q8_0, F16)), 1),
    ],
    ids=["stretches", "two parts and a large rank"],
)
def test_on_any_driver(recording: Recording, case: Case, splits: int) -> None:
    """A tile so small that software drivers compile it in seconds."""
    check(with_tile(recording, SMALLEST, splits, on_software=True), case)


@pytest.mark.parametrize("tile", PAIRED_TILES, ids=lambda tile: tile.name)
@pytest.mark.parametrize("n_in", [224, 800])
def test_every_tile(recording: Recording, tile: PairedTile, n_in: int) -> None:
    """Also over a contraction in which sums are carried."""
    check(with_tile(recording, tile), Case(n_in=n_in))


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, 4, 32, ranges=(), parts=(F16,)),
        Case(40, 39, 64, 32, rank=40, ranges=((4, 12), (12, 64))),
        Case(bias=True, softcap=7.0),
        Case(parts=(Q8_0, F16), ranges=((8, 44), (60, 132)), bias=True),
    ],
    ids=["one row", "large ranks", "head", "two parts"],
)
def test_shapes_and_what_comes_after(recording: Recording, case: Case) -> None:
    check(with_tile(recording, SMALL), case)


@pytest.mark.parametrize("kind", ALL_TYPES, ids=type_name)
def test_every_type(recording: Recording, kind: GGMLQuantizationType) -> None:
    check(with_tile(recording, SMALL), Case(20, 20, 36, 256, ranges=(), parts=(kind,)))


# -- how exact ----------------------------------------------------------------------------------


def computed(
    recording: Recording, tile: Tile, x: np.ndarray, w: np.ndarray, *, transposed: bool
) -> np.ndarray:
    """x · Wᵀ, or x · W where transposed, with W in F32."""

    def plans(request: Request) -> Plan:
        return Plan(tile, *cut(request.constants["contraction"], 1, tile.depth))

    own = replace(recording, body=tile.body, plans=plans)
    matrix = load_matrix(own, [tensor_of(F32, w.view(np.uint8), w.shape[1])])
    extent, program = extent_in_use(own, len(x), len(x)), Program(own)
    x_tensor = own.memory.empty(x.shape, extent=extent)
    own.memory.write(x_tensor, x)
    out = own.memory.empty((len(x), w.shape[1] if transposed else len(w)), extent=extent)
    if transposed:
        matmul_backward(program, x_tensor, matrix, out=out)
    else:
        matmul(program, Product(x_tensor, matrix), out=out)
    return run_twice(program, out)


KINDS = {
    "ordinary": lambda rng, n: np.ones((8, 1)),
    "rows that differ by 1e6": lambda rng, n: np.array([[1e-3], [1e3]] * 4),
    "up to 1e30": lambda rng, n: np.full((8, 1), 1e29),
    "down to 1e-30": lambda rng, n: np.full((8, 1), 1e-29),
    "of all sizes": lambda rng, n: 10.0 ** rng.uniform(-30, 30, (8, n)),
}


def rows_of_all_kinds(contraction: int) -> np.ndarray:  # f32 [8 · kinds, contraction]
    rng = np.random.default_rng(1)
    rows = [rng.normal(size=(8, contraction)) * size(rng, contraction) for size in KINDS.values()]
    return np.concatenate(rows).astype(np.float32)


def weights_of_all_kinds(
    columns: int, contraction: int
) -> np.ndarray:  # f32 [columns, contraction]
    """Each output's of a size of its own, products within f32 with those rows."""
    sizes = np.resize([1.0, 1e6, 1e-6, 0.02, 300.0], (columns, 1))
    normal = np.random.default_rng(2).normal(size=(columns, contraction))
    return (normal * sizes).astype(np.float32)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "to the input"])
@pytest.mark.parametrize("contraction", [32, LONG])
def test_at_most_twice_the_plain_error(
    recording: Recording, contraction: int, transposed: bool
) -> None:
    """Whatever the size of a row, and of what it is multiplied with."""
    rows, w = rows_of_all_kinds(contraction), weights_of_all_kinds(36, contraction)
    exact = rows.astype(np.float64) @ w.T.astype(np.float64)
    size = np.abs(rows).astype(np.float64) @ np.abs(w).T.astype(np.float64)
    stored = np.ascontiguousarray(w.T) if transposed else w
    errors = []
    for tile in (TILES[0], SMALLEST):
        found = computed(recording, tile, rows, stored, transposed=transposed)
        error = (np.abs(found - exact) / size).reshape(len(KINDS), -1)
        errors.append((np.sqrt(np.mean(error**2, axis=1)), error.max(axis=1)))
    for plain, paired in zip(*errors, strict=True):
        for kind, theirs, ours in zip(KINDS, plain, paired, strict=True):
            print(f"{contraction} {kind}: plain {theirs:.1e}, in pairs {ours:.1e}")
            # Of all sizes, few products count where there are few, and each of them is rounded
            # thrice: both numbers to 2^-23, and what lower times lower would be to 2^-22.
            alone = kind == "of all sizes" and contraction < 1000
            # Units that truncate do so three times a step, where plain kernels round once a term:
            # of few terms the error is twice to three times theirs, of many a third.
            most = 4 if contraction < 1000 and recording.facts.has_matrix_units else 2
            assert ours <= (2.0**-21 if alone else most * theirs), kind


def test_what_is_not_finite_stays_so(recording: Recording) -> None:
    """And zeros: in x, and in z of the low-rank part."""
    rng = np.random.default_rng(3)
    x, w = rng.normal(size=(12, 64)).astype(np.float32), rng.normal(size=(36, 64))
    z, b = rng.normal(size=(12, 4)).astype(np.float32), rng.normal(size=(36, 4))
    w[5, 7], b[6, 1] = 0.0, 0.0
    x[0], x[1, 7], x[2, 7], x[3, 9] = 0.0, np.inf, -np.inf, np.nan
    x[4, 3], x[4, 7] = np.inf, -np.inf
    x[5], z[5], x[5, 4], z[10], z[10, 2] = 0.0, 0.0, 3e38, 0.0, 3e38  # products pass f32
    x[6, 7], x[6, 8] = np.inf, 1e30
    x[7] *= 1e-38  # numbers below 2^-126 among them
    z[0], z[8, 1], z[9, 2] = 0.0, -np.inf, np.nan
    found = []
    for tile in (TILES[0], SMALLEST):

        def plans(request: Request, tile: Tile = tile) -> Plan:
            return Plan(tile, *cut(request.constants["contraction"], 1, tile.depth))

        own = replace(recording, body=tile.body, plans=plans)
        memory, program = own.memory, Program(own)
        matrix = load_matrix(own, [tensor_of(F32, w.astype(np.float32).view(np.uint8), 64)])
        extent = extent_in_use(own, 12, 12)
        x_t, z_t = (memory.empty(a.shape, extent=extent) for a in (x, z))
        memory.write(x_t, x)
        memory.write(z_t, z)
        lora = LoraFactors(memory.upload(np.zeros((4, 64))), memory.upload(b), 4, 1.0, ((0, 36),))
        out = matmul(program, Product(x_t, matrix, lora=lora, z=z_t))
        found.append(run_twice(program, out))
    plain, paired = found
    assert np.isnan(plain).any() and np.isinf(plain).any()
    # In pairs what is infinite is NaN, but for what is so by its scale or by the low-rank part.
    finite = np.isfinite(plain)
    assert (finite == np.isfinite(paired)).all()
    infinite = np.isinf(paired)
    assert infinite.any() and (plain[infinite] == paired[infinite]).all()
    np.testing.assert_allclose(paired[finite], plain[finite], rtol=1e-4, atol=1e-5)
    assert (paired[0] == 0).all()


def test_a_row_does_not_depend_on_its_neighbours(recording: Recording) -> None:
    """Rows of a frozen prefix are kept and used again among others: not a bit may change."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(34, 32)).astype(np.float32)
    w = rng.normal(size=(36, 32)).astype(np.float32)
    alone = computed(recording, SMALLEST, x, w, transposed=False)
    x[1::2] *= 1e25
    beside = computed(recording, SMALLEST, x, w, transposed=False)
    assert alone[::2].tobytes() == beside[::2].tobytes()
    assert (alone[1::2] != beside[1::2]).any()


def truncated(sums: np.ndarray) -> np.ndarray:
    """f64 as f32, towards zero, as NVIDIA's units round where they add."""
    nearest = sums.astype(np.float32)
    too_far = np.abs(nearest.astype(np.float64)) > np.abs(sums)
    return np.where(too_far, np.nextafter(nearest, np.float32(0)), nearest).astype(np.float64)


def halves(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What f16 makes of numbers of up to 8, and of what that leaves: as they are scaled."""
    upper = (2.0**12 * numbers).astype(np.float16).astype(np.float64)
    lower = (2.0**12 * numbers - upper).astype(np.float16).astype(np.float64)
    return 2.0**-12 * upper, 2.0**-12 * lower


def truncating_errors(terms: int, *, positive: bool) -> tuple[float, dict[int, float]]:
    """Errors of 400 sums of so many products: plain ones', and the units' by how often carried.

    Root mean squares. Of each number's pair the halves are multiplied in turn, into the same sum.
    """
    rng = np.random.default_rng(5)
    x, w = rng.normal(size=(2, 400, terms)).astype(np.float32).astype(np.float64)
    if positive:
        x, w = np.abs(x), np.abs(w)
    exact = np.einsum("nk,nk->n", x, w)

    def error(sums: np.ndarray) -> float:
        return float(np.sqrt(np.mean((sums - exact) ** 2)))

    plain = np.zeros(len(x), np.float32)
    for k in range(terms):  # a fused multiply-add each
        plain = (plain + x[:, k] * w[:, k]).astype(np.float32)
    left, right = halves(x), halves(w)
    found = {}
    for carry in (carry_of(terms), LONG):
        total, sums = np.zeros(len(x), np.float32), np.zeros(len(x))
        for step in range(0, terms, 16):
            at = slice(step, step + 16)
            for a, b in ((0, 0), (1, 0), (0, 1)):
                sums = truncated(sums + np.einsum("nk,nk->n", left[a][:, at], right[b][:, at]))
            if (step + 16) % carry == 0:
                total, sums = (total + sums).astype(np.float32), np.zeros(len(x))
        found[carry] = error(total + sums)
    return error(plain), found


@pytest.mark.parametrize("positive", [False, True], ids=["normal", "positive"])
def test_units_that_truncate(positive: bool) -> None:
    """Carried now and then, their sums are better than plain ones; never carried, worse."""
    plain, found = truncating_errors(LONG, positive=positive)
    carried = found[carry_of(LONG)]
    print(f"plain {plain:.1e}, carried {carried:.1e}, never carried {found[LONG]:.1e}")
    assert carried < 0.75 * plain and found[LONG] > 3 * plain


@pytest.mark.parametrize(("terms", "most"), [(128, 4), (576, 2), (2048, 1), (4096, 1.2)])
def test_units_that_truncate_sums_of_few_terms(terms: int, most: float) -> None:
    """They do so three times in 16 terms, of which plain ones round each once: to its nearest."""
    plain, found = truncating_errors(terms, positive=False)
    carried = found[carry_of(terms)]
    print(f"{terms}: {carried / plain:.2f} of the plain error")
    assert carried < most * plain


# -- the largest numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in ALL_TYPES if k != F16], ids=type_name)
def test_the_largest_weights(recording: Recording, kind: GGMLQuantizationType) -> None:
    """Of each row and each column, as f32's bits; a second load finds the same."""
    rows, columns = 36, 256
    tensor = tensor_of(kind, random_blocks(kind, rows, columns, 0), columns)
    own = replace(recording, body="paired")
    parts = [load_matrix(own, [tensor]).parts[0] for _ in range(2)]
    assert parts[0].largest is not None and parts[1].largest is not None
    found, again = (
        own.memory.read(part.largest).view(np.float32) for part in parts if part.largest
    )
    weights = np.abs(dequantized(tensor))
    wanted = np.concatenate([weights.max(axis=1), weights.max(axis=0)])
    np.testing.assert_allclose(found, wanted, rtol=2.0**-22)
    assert found.tobytes() == again.tobytes()


def test_columns_that_are_no_eights(recording: Recording) -> None:
    """What follows a row's last four weights is the next row's."""
    w = np.ones((8, 36), np.float32)
    w[1] = 1e20
    tensor = tensor_of(F32, w.view(np.uint8), 36)
    part = load_matrix(replace(recording, body="paired"), [tensor]).parts[0]
    assert part.largest is not None
    found = recording.memory.read(part.largest).view(np.float32)
    assert (found[:8] == w.max(axis=1)).all() and (found[8:] == np.float32(1e20)).all()


def test_what_is_counted_is_what_is_taken(recording: Recording) -> None:
    """Of memory; the sizes of rows are one tensor of the outer memory for all products."""
    allocated = []
    for memory in (recording.memory.inner(), CountingMemory(recording.facts)):
        own = with_tile(replace(recording, memory=memory), SMALLEST, on_software=True)
        w = np.ones((36, 32), np.float32)
        matrix = load_matrix(own, [tensor_of(F32, w.view(np.uint8), 32)])
        extent, program = extent_in_use(own, 34, 34), Program(own)
        x = own.memory.empty((34, 32), extent=extent)
        for _ in range(2):
            matmul(program, Product(x, matrix))
        assert len({d.tensors[2].buffer for d in program.dispatches if "rows" in d.template}) == 1
        allocated.append(memory.allocated)
    ours, counted = allocated
    assert ours["weights"] == counted["weights"] > w.nbytes
    assert counted["activations"] - ours["activations"] == 256  # the outer memory's


# -- where it is taken ---------------------------------------------------------------------------


def offered(kind: Kind, precision: str, products: str | None = None) -> tuple[set[str], bool]:
    """The bodies of a product's tiles, and whether the weights' sizes are kept."""
    requests: list[Request] = []
    memory = CountingMemory(kind.facts)
    recording = Recording(kind.facts, memory, precision, products=products, plans=noting(requests))
    matrix = load_matrix(recording, [tensor_of(Q8_0, random_blocks(Q8_0, 64, 64, 0), 64)])
    x = memory.empty((32, 64), precision, extent=memory.extent(32))
    matmul(Program(recording), Product(x, matrix))
    return {tile.body for tile in requests[0].tiles}, matrix.parts[0].largest is not None


def test_where_units_multiply_pairs() -> None:
    for kind in (MATRIX_GPU, SMALL_MATRICES):
        assert offered(kind, "f32") == ({"paired", "tiled"}, True)
        assert offered(kind, "f32", "f32") == ({"tiled"}, False)
        assert offered(kind, "f16") == ({"matrix", "tiled"}, False)
    assert offered(LARGE_GPU, "f32") == ({"tiled"}, False)
    software = replace(MATRIX_GPU, adapter_type="CPU")
    memory = CountingMemory(software.facts)
    assert not Recording(software.facts, memory).paired_products


def test_what_it_cannot_multiply_is_refused(recording: Recording) -> None:
    """Weights that were loaded for other products, and numbers of f16."""
    own = with_tile(recording, SMALLEST, on_software=True)
    tensor = tensor_of(Q8_0, random_blocks(Q8_0, 32, 64, 0), 64)
    known, unknown = (load_matrix(r, [tensor]) for r in (own, replace(own, body="tiled")))
    extent = extent_in_use(own, 8, 8)
    for matrix, dtype in ((unknown, "f32"), (known, "f16")):
        x = own.memory.empty((8, 64), dtype, extent=extent)
        out = own.memory.empty((8, 32), extent=extent)
        with pytest.raises(ValueError, match="pairs are of f32"):
            matmul(Program(own), Product(x, matrix), out=out)


def test_tiles_fit_workgroups() -> None:
    check_tiles_fit(PAIRED_TILES, (MATRIX_GPU, SMALL_MATRICES))
