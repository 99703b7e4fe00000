"""Products of pairs of f16 that are made beforehand: to the last bit those of pairs made in tiles.

test_matmul_paired.py has their errors against float64.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from lora.backward.matmul import matmul_backward
from lora.checks.references.pairs import paired_numbers
from lora.forward.gguf.file import GGUFTensor
from lora.forward.matmul import matmul
from lora.forward.model.factors import LoraFactors
from lora.forward.model.weights import MOST_DECODED, load_matrix
from lora.forward.pairs import pair_rows, pair_weights
from lora.forward.part_product import Place
from lora.forward.plans.matmul_plans import Request
from lora.forward.plans.matmul_tiles import PREPARED_TILES, PairedTile, Plan, PreparedTile, cut
from lora.forward.product import Product
from lora.shaders.facts import DeviceFacts
from lora.shaders.memory import CountingMemory
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import MARKER, extent_in_use, run_twice
from tests.support.matrix_products import Case, check, check_tiles_fit, with_tile
from tests.support.quantized_tensors import (
    ALL_TYPES,
    dequantized,
    random_blocks,
    tensor_of,
    type_name,
)
from tests.support.renderings import LARGE_GPU, MATRIX_GPU, SMALL_MATRICES, Kind

Type = GGMLQuantizationType
SIZES = (32, 32, 16, 32, 16)  # that software drivers compile in seconds
SMALLEST = PreparedTile(*SIZES)
BETWEEN = 2.0**-22  # what decoding in f32 may be off by


def pair_bound(numbers: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Half a step of the lower half's 11 bits, and of the smallest step that f16 has."""
    return 2.0**-23 * np.abs(numbers) + 2.0**-39 * largest


# -- the pairs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "first"), [(100, 0), (64, 8), (4, 4), (2052, 12)])
def test_rows(recording: Recording, columns: int, first: int) -> None:
    """Sizes to the bit; zeros up to whole steps, and rows that are not in use left as they are."""
    rng = np.random.default_rng(columns)
    x = rng.normal(size=(7, columns + 12)) * 10.0 ** rng.uniform(-30, 30, (7, 1))
    x = x.astype(np.float32)
    x[2], x[3, first:] = 0.0, 0.0
    x[3, first + 1] = -1e-40
    padded = -(-columns // 32) * 32
    extent, program = extent_in_use(recording, 7, 6), Program(recording)
    x_t = recording.memory.empty(x.shape, extent=extent)
    recording.memory.write(x_t, x)
    largest = recording.memory.upload(np.full(7, 9, np.uint32))
    out = recording.memory.empty((2, 7, padded // 2), "u32")
    place = Place(first, 0) if first else None
    pair_rows(program, x_t, columns, place, largest=largest, out=out, label="x")
    words = run_twice(program, out, np.full(out.shape, 9, np.uint32))
    taken = x[:6, first : first + columns].astype(np.float64)
    size = np.abs(taken).max(axis=1)
    found = recording.memory.read(largest)
    flushed = size < 2.0**-126  # some devices have no numbers so small
    assert (found[:6].view(np.float32)[~flushed] == size[~flushed]).all() and found[6] == 9
    wanted = np.pad(taken, ((0, 0), (0, padded - columns)))
    pairs = paired_numbers(words[:, :6], size[:, None])
    off = np.abs(pairs - wanted) <= pair_bound(wanted, size[:, None]) + 2.0**-126
    assert off.all() and (words[:, 6:] == 9).all()


@pytest.mark.parametrize("kind", [k for k in ALL_TYPES if k != Type.F16], ids=type_name)
def test_weights(recording: Recording, kind: Type) -> None:
    """By rows and by columns, whose sizes differ."""
    rows, columns = 9, 256
    blocks = random_blocks(kind, rows, columns, 0)
    paired_matrix(recording, tensor_of(kind, blocks, columns), (rows + 3, columns + 32))


def test_weights_that_are_no_eights(recording: Recording) -> None:
    """What follows a row's last four weights is the next row's."""
    rng = np.random.default_rng(0)
    w = (rng.normal(size=(8, 36)) * 10.0 ** rng.uniform(-20, 20, (8, 1))).astype(np.float32)
    paired_matrix(recording, tensor_of(Type.F32, w.view(np.uint8), 36), (8, 48))


def paired_matrix(recording: Recording, tensor: GGUFTensor, padded: tuple[int, int]) -> None:
    part = load_matrix(replace(recording, body="prepared"), [tensor]).parts[0]
    exact = dequantized(tensor)
    rows, columns = exact.shape
    exact = np.pad(exact, ((0, part.words.shape[0] - rows), (0, 0)))
    rows = len(exact)
    wanted = np.zeros((max(padded[0], rows), padded[1]))
    wanted[:rows, :columns] = exact
    assert part.largest is not None
    sizes = recording.memory.read(part.largest).view(np.float32)
    for by_columns in (False, True):
        program = Program(recording)
        out = recording.memory.empty((2, wanted.shape[0], padded[1] // 2), "u32")
        pair_weights(
            program, part.words, part.quantization.name, part.largest,
            by_columns=by_columns, out=out, label="w",
        )  # fmt: skip
        words = run_twice(program, out, np.full(out.shape, 7, np.uint32))
        size = np.ones(wanted.shape)
        if by_columns:
            size[:, :columns] = sizes[rows:]
        else:
            size[:rows] = sizes[:rows, None]
        off = np.abs(paired_numbers(words, size) - wanted)
        assert (off <= pair_bound(wanted, size) + BETWEEN * np.abs(wanted)).all()
        assert (words[:, rows:] == 0).all()


# -- the products -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "splits"),
    [
        (Case(33, 32, 68, 100, ranges=((8, 44),), parts=(Type.F32,), bias=True, residual=True), 2),
        (Case(20, 19, 36, 64, rank=20, ranges=((4, 32),), parts=(Type.Q8_0, Type.F16)), 1),
        (Case(40, 37, 36, 100, ranges=(), parts=(Type.F16,), scaled=True, softcap=7.0), 2),
    ],
    ids=["stretches", "two parts and a large rank", "weights of f16, scaled and capped"],
)
def test_on_any_driver(recording: Recording, case: Case, splits: int) -> None:
    check(with_tile(recording, SMALLEST, splits, on_software=True), case)


@pytest.mark.parametrize("tile", PREPARED_TILES, ids=lambda tile: tile.name)
@pytest.mark.parametrize("n_in", [224, 800])
def test_every_tile(recording: Recording, tile: PreparedTile, n_in: int) -> None:
    """Also over a contraction in which sums are carried."""
    check(with_tile(recording, tile), Case(n_in=n_in))


@pytest.mark.parametrize("kind", ALL_TYPES, ids=type_name)
def test_every_type(recording: Recording, kind: Type) -> None:
    case = Case(20, 20, 36, 256, ranges=(), parts=(kind,))
    check(with_tile(recording, PREPARED_TILES[-1]), case)


def both(
    recording: Recording, kind: Type, sizes: tuple[int, int], x: np.ndarray, splits: int
) -> list[list[np.ndarray]]:
    """A product of two parts with its low-rank part and, in one stretch, its gradient, by each."""
    (n_out, n_in), rows = sizes, len(x)
    tensors = [tensor_of(kind, random_blocks(kind, n_out, n_in, 0), n_in)]
    tensors += [tensor_of(Type.F16, random_blocks(Type.F16, n_out, n_in, 1), n_in)]
    rng = np.random.default_rng(1)
    z = rng.normal(size=(rows, 4)).astype(np.float32)
    a, b = rng.normal(size=(4, n_in)), rng.normal(size=(2 * n_out, 4))
    found = []
    for tile in (PairedTile(*SIZES), SMALLEST):

        def plans(request: Request, tile: PairedTile = tile) -> Plan:
            return Plan(tile, *cut(request.constants["contraction"], splits, tile.depth))

        own = replace(recording, body=tile.body, plans=plans)
        memory = own.memory
        matrix = load_matrix(own, tensors)
        extent = extent_in_use(own, rows, rows - 1)
        lora = LoraFactors(memory.upload(a), memory.upload(b), 4, 1.0, ((0, 2 * n_out),))
        results = []
        directions = ((n_in, 2 * n_out), (2 * n_out, n_in))
        for width, out_width in directions[: 1 if splits > 1 else 2]:  # the other is short then
            x_t = memory.empty((rows, width), extent=extent)
            memory.write(x_t, np.resize(x, (rows, width)))
            z_t = memory.empty(z.shape, extent=extent)
            memory.write(z_t, z)
            out, program = memory.empty((rows, out_width), extent=extent), Program(own)
            if width == n_in:
                matmul(program, Product(x_t, matrix, lora=lora, z=z_t), out=out)
            else:
                matmul_backward(program, x_t, matrix, lora=lora, d_z=z_t, out=out)
            templates = [dispatch.template for dispatch in program.dispatches]
            prepared = tile is SMALLEST
            assert (
                templates.count("pair_rows") == 2 * prepared and
                templates.count("pair_weights") == 1 * prepared and
                templates.count("largest_of_rows") == 2 * (not prepared)
            )  # fmt: skip
            results.append(run_twice(program, out, np.full(out.shape, MARKER, np.float32)))
        found.append(results)
    return found


@pytest.mark.parametrize(
    ("kind", "sizes", "splits"),
    [
        (Type.Q8_0, (36, 64), 1),
        (Type.F32, (44, 36), 1),
        (Type.Q4_K, (16, 512), 3),
    ],
    ids=["in whole steps", "in none", "in stretches, and carried"],
)
def test_the_same_to_the_last_bit(
    recording: Recording, kind: Type, sizes: tuple[int, int], splits: int
) -> None:
    """Of numbers of all sizes, infinite ones and NaN among them: so test_matmul_paired.py holds."""
    if recording.facts.is_cpu:
        # llvmpipe's units take ten minutes to compile sums that are carried beside a low-rank part.
        recording = replace(recording, facts=replace(recording.facts, matrix_shapes=()))
    rng = np.random.default_rng(2)
    x = rng.normal(size=(35, sizes[1])) * 10.0 ** rng.uniform(-25, 25, (35, 1))
    x[0], x[1, 7], x[2, 5], x[3, 9], x[4, 2] = 0.0, np.inf, -np.inf, np.nan, 1e-40
    x[5, :] = 1e-39
    in_tiles, beforehand = both(recording, kind, sizes, x.astype(np.float32), splits)
    assert np.isnan(in_tiles[0]).any() and np.isfinite(in_tiles[0]).any()
    for ours, theirs in zip(beforehand, in_tiles, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# -- where it is taken ---------------------------------------------------------------------------


def product_of(
    facts: DeviceFacts, rows: int, type_: Type, shape: tuple[int, int], products: str | None = None
) -> tuple[CountingMemory, list[int], bool]:
    """The memory of a product by the first tile, rows of the parts, and whether it is offered."""
    requests: list[Request] = []

    def source(request: Request) -> Plan | None:
        requests.append(request)
        tiles = [tile for tile in request.tiles if tile.body == "prepared"]
        c = request.constants["contraction"]
        return Plan(tiles[0], *cut(c, 1, tiles[0].depth)) if tiles else None

    memory = CountingMemory(facts)
    recording = Recording(facts, memory, "f32", products=products, plans=source)
    matrix = load_matrix(recording, [GGUFTensor("w", type_, shape, np.zeros((0, 0), np.uint8))])
    program, extent = Program(recording), memory.extent(rows)
    for _ in range(2):
        x = memory.empty((rows, shape[1]), extent=extent)
        matmul(program, Product(x, matrix), out=memory.empty((rows, shape[0]), extent=extent))
    offered = {any(tile.body == "prepared" for tile in request.tiles) for request in requests}
    assert len(offered) == 1
    return memory, [part.out_features for part in matrix.parts], offered.pop()


@pytest.mark.parametrize(
    ("kind", "rows", "type_", "shape", "parts", "scratch"),
    [
        (MATRIX_GPU, 2048, Type.Q4_K, (4096, 4096), [4096], 4 * (4096 + 2048) * 4096),
        (SMALL_MATRICES, 256, Type.F32, (4096, 4096), [4096], 4 * (4096 + 256) * 4096),
        (MATRIX_GPU, 257, Type.F32, (68, 100), [68], 4 * (68 * 128 + 257 * 128)),
        (MATRIX_GPU, 512, Type.F16, (4096, 4096), [4096], 4 * 512 * 4096),
        (MATRIX_GPU, 512, Type.Q8_0, (20480, 8192), [8192, 8192, 4096], 4 * (8192 + 512) * 8192),
        (MATRIX_GPU, 255, Type.Q4_K, (4096, 4096), [4096], None),
        (MATRIX_GPU, 32768, Type.Q4_K, (4096, 4096), [4096], None),
        (replace(MATRIX_GPU, max_binding=65 << 20), 512, Type.Q4_K, (4096, 4096), [4096], None),
        (LARGE_GPU, 2048, Type.Q4_K, (4096, 4096), [4096], None),
    ],
    ids=[
        "large", "small units", "in no whole steps", "f16", "in parts", "few rows", "many rows",
        "small bindings", "no units",
    ],
)  # fmt: skip
def test_where_it_is_offered(
    kind: Kind,
    rows: int,
    type_: Type,
    shape: tuple[int, int],
    parts: list[int],
    scratch: int | None,
) -> None:
    """And the bytes of scratch memory, those of one matrix at a time."""
    memory, found, offered = product_of(kind.facts, rows, type_, shape)
    assert found == parts and offered == (scratch is not None)
    if scratch is not None:
        assert memory.allocated["scratch"] == -(-scratch // 256) * 256 <= 2 * MOST_DECODED
    assert not product_of(kind.facts, rows, type_, shape, "f32")[2]


def test_not_where_pairs_are_wrong() -> None:
    facts = replace(MATRIX_GPU.facts, distrusted=frozenset({"pairs"}))
    assert not product_of(facts, 2048, Type.Q4_K, (4096, 4096))[2]


def test_what_is_counted_is_what_is_taken(recording: Recording) -> None:
    """Of scratch memory, sums in stretches beside the pairs."""
    allocated = []
    for memory in (recording.memory.inner(), CountingMemory(recording.facts)):
        own = with_tile(replace(recording, memory=memory), SMALLEST, 2, on_software=True)
        w = np.ones((36, 64), np.float32)
        matrix = load_matrix(own, [tensor_of(Type.F32, w.view(np.uint8), 64)])
        extent, program = extent_in_use(own, 34, 34), Program(own)
        matmul(program, Product(own.memory.empty((34, 64), extent=extent), matrix))
        allocated.append(memory.allocated)
        first, beside, rows = outer_of(memory).largest_scratch
        assert (first, beside, rows) == (36 * 64 + 34 * 64, 2 * 34 * 36, 0)


def outer_of(memory: object) -> CountingMemory:
    return getattr(memory, "_outer", None) or memory  # type: ignore[return-value]


def test_tiles_fit_workgroups() -> None:
    check_tiles_fit(PREPARED_TILES, (MATRIX_GPU, SMALL_MATRICES))
    # Some leave room for two workgroups on a multiprocessor.
    assert sum(tile.workgroup_bytes <= 24576 for tile in PREPARED_TILES) >= 3
