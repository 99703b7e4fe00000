"""Every tile of the tiled matmul, as written out for a GPU too, and the choice among them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from lora.backward.matmul import matmul_backward
from lora.forward.matmul import matmul
from lora.forward.matmul_tiled import HALF_CARRY
from lora.forward.model.factors import LoraFactors
from lora.forward.model.weights import load_matrix
from lora.forward.plans.matmul_plans import Request
from lora.forward.plans.matmul_tiles import (
    DECODED_TILES,
    HALF_TILES,
    MATRIX_TILES,
    MOST_CANDIDATES,
    MOST_PARTIAL_SUMS,
    PAIRED_TILES,
    PREPARED_TILES,
    TILES,
    Plan,
    PlanSpace,
    Tile,
    candidates,
    choose_plan,
    cut,
    ranked_plans,
    tiles_of,
)
from lora.forward.product import Product
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.half_tensors import needs_halves
from tests.support.kernels import MARKER, extent_in_use, run_twice
from tests.support.quantized_tensors import random_blocks, tensor_of

Q4_1 = GGMLQuantizationType.Q4_1
ROWS, IN_USE, N_OUT, N_IN, RANK = 70, 67, 100, 224, 4


@pytest.fixture
def tiled(recording: Recording) -> Recording:
    return replace(recording, body="tiled")


def force(recording: Recording, tile: Tile, splits: int) -> Recording:
    def plans(request: Request) -> Plan:
        return Plan(tile, *cut(request.constants["contraction"], splits, tile.depth))

    return replace(recording, plans=plans)


def write_out(recording: Recording, monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    """Lets kernels be written out whole, as on a GPU; llvmpipe takes seconds for each."""
    kernel = recording.memory.kernel

    def written_out(template: str, constants: Mapping[str, Any]) -> Any:
        if template == "matmul_tiled":
            constants = {**constants, "unroll": depth}
        return kernel(template, constants)

    monkeypatch.setattr(recording.memory, "kernel", written_out)


def check_both_directions(recording: Recording, dtype: str, rounding: float) -> None:
    """Compares both directions with float64.

    Args:
        dtype: of x, y and their gradients.
        rounding: relative error of a result of some hundred terms.
    """
    rng = np.random.default_rng(0)
    data = random_blocks(Q4_1, N_OUT, N_IN)
    w = quants.dequantize(data, Q4_1).reshape(N_OUT, N_IN).astype(np.float64)
    matrix = load_matrix(recording, [tensor_of(Q4_1, data, N_IN)])
    shapes = {"x": N_IN, "z": RANK, "d_y": N_OUT, "d_z": RANK}
    arrays = {k: rng.normal(size=(ROWS, n)).astype(np.float32) for k, n in shapes.items()}
    a, b = (rng.normal(size=s).astype(np.float32) for s in ((RANK, N_IN), (36, RANK)))
    extent = extent_in_use(recording, ROWS, IN_USE)
    tensors = {}
    for name, array in arrays.items():
        stored = "f32" if name in ("z", "d_z") else dtype
        tensors[name] = recording.memory.empty(array.shape, stored, extent=extent)
        recording.memory.write(tensors[name], array)
        arrays[name] = array.astype(tensors[name].numpy_dtype)
    lora = LoraFactors(
        recording.memory.upload(a), recording.memory.upload(b), RANK, 1.5, ((8, 44),)
    )
    results = []
    for width in (N_OUT, N_IN):
        results.append(recording.memory.empty((ROWS, width), dtype, extent=extent))
        recording.memory.write(results[-1], np.full((ROWS, width), MARKER, np.float32))
    forward, backward = Program(recording), Program(recording)
    matmul(forward, Product(tensors["x"], matrix, lora=lora, z=tensors["z"]), out=results[0])
    matmul_backward(backward, tensors["d_y"], matrix, lora=lora, d_z=tensors["d_z"], out=results[1])
    x, z, d_y, d_z = (arrays[name].astype(np.float64) for name in ("x", "z", "d_y", "d_z"))
    expected = x @ w.T
    expected[:, 8:44] += 1.5 * z @ b.T
    for program, result, wanted in zip(
        (forward, backward), results, (expected, d_y @ w + d_z @ a), strict=True
    ):
        found = run_twice(program, result).astype(np.float64)
        bound = rounding * np.abs(wanted).max()
        assert np.abs(found[:IN_USE] - wanted[:IN_USE]).max() < bound
        assert (found[IN_USE:] == MARKER).all()


# Stretches for every other; written out whole, as on a GPU, for one small and one with a long step.
@pytest.mark.parametrize(
    ("tile", "unrolled", "splits"),
    [(tile, False, 1 + i % 2) for i, tile in enumerate(TILES)]
    + [(TILES[0], True, 2), (TILES[5], True, 1)],
)
def test_both_directions(
    tiled: Recording, tile: Tile, unrolled: bool, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiled = force(tiled, tile, splits)
    if unrolled:
        write_out(tiled, monkeypatch, tile.depth)
    # As in test_matmul.py: errors grow as sqrt(n) · 2^-24 of the largest result.
    check_both_directions(tiled, "f32", 4 * np.sqrt(min(N_IN, N_OUT) + RANK) * 2.0**-24)


@pytest.mark.parametrize(
    ("tile", "unrolled", "splits"),
    [(tile, False, 1) for tile in HALF_TILES]
    + [(HALF_TILES[0], False, 2), (HALF_TILES[4], True, 1)],
)
def test_tiles_of_f16(
    tiled: Recording, tile: Tile, unrolled: bool, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_halves(tiled.facts)
    tiled = replace(tiled, precision="f16")
    tiled = force(tiled, tile, splits)
    if unrolled:
        write_out(tiled, monkeypatch, tile.depth)
    # Up to HALF_CARRY steps are summed in f16, each sum within 2^-12 of a part of the result: over
    # a part errors grow as the root of its steps, over parts as the results do.
    check_both_directions(tiled, "f16", 4 * np.sqrt(HALF_CARRY) * 2.0**-12)


def test_stretches_cover_the_contraction() -> None:
    for contraction in (4, 36, 576, 1536, 49152):
        for splits in (1, 2, 4, 8):
            for depth in (16, 32):
                n, length = cut(contraction, splits, depth)
                assert (n - 1) * length < contraction <= n * length and n <= splits
                assert length % depth == 0


def test_choice() -> None:
    """Small products get small tiles and stretches, large ones large tiles and one pass."""
    small, splits, _ = choose_plan(PlanSpace(128, 576, 3072, tiles_of(False, 16384)))
    assert small.tile_rows * small.tile_columns <= 4096 and splits > 1
    large, splits, length = choose_plan(PlanSpace(4096, 4096, 4096, tiles_of(False, 49152)))
    assert (large.tile_rows, large.tile_columns, splits, length) == (128, 128, 1, 4096)
    for rows in (1, 100, 5000):
        for columns in (4, 576, 49152):
            for contraction in (4, 576, 49152):
                for half in (False, True):
                    tiles = tiles_of(half, 16384)
                    assert all(tile.workgroup_bytes <= 16384 for tile in tiles)
                    assert choose_plan(PlanSpace(rows, columns, contraction, tiles)).tile in tiles


def test_candidates() -> None:
    """A few, of several tiles, the model's choice first, none that it thinks much slower."""
    for shape in ((128, 576, 3072), (512, 16384, 2048), (2048, 960, 576), (64, 640, 262144)):
        for half in (False, True):
            space = PlanSpace(*shape, tiles_of(half, 49152))
            plans = candidates(space)
            assert plans[0] == choose_plan(space)
            assert 6 <= len(plans) == len(set(plans)) <= MOST_CANDIDATES
            tiles = Counter(plan.tile for plan in plans)
            assert len(tiles) >= 4 and max(tiles.values()) <= 2
            times = [space.microseconds(plan) for plan in plans]
            assert times == sorted(times) and times[-1] <= 2 * times[0]


def test_tiles_have_names_of_their_own() -> None:
    for tiles in (TILES, HALF_TILES):
        assert len({tile.name for tile in tiles}) == len(tiles)
        for tile in tiles:
            lanes = tile.tile_rows // tile.lane_rows * (tile.tile_columns // tile.lane_columns)
            # Every lane fetches whole units: four numbers of x, eight weights.
            assert tile.depth * tile.tile_rows % (4 * lanes) == 0
            assert tile.depth * tile.tile_columns % (8 * lanes) == 0
            assert lanes <= 256 and tile.workgroup_bytes <= 32768


@pytest.mark.parametrize(("rows", "columns", "vocab_size"), [(512, 576, 49152), (128, 640, 262144)])
def test_stretches_of_a_vocabulary_go_round_the_multiprocessors(
    rows: int, columns: int, vocab_size: int
) -> None:
    """In powers of two SmolLM2's 20 tiles leave a fifth of an H200 idle."""
    space = PlanSpace(rows, columns, vocab_size, MATRIX_TILES)
    tile, splits, length = choose_plan(space)
    workgroups = splits * -(-rows // tile.tile_rows) * -(-columns // tile.tile_columns)
    assert workgroups / (-(-workgroups // 132) * 132) > 0.95
    assert length % tile.depth == 0 and (splits - 1) * length < vocab_size <= splits * length
    powers = [n for n in space.splits(tile) if n & (n - 1) == 0]
    assert {*powers} == {1, 2, 4, 8, 16} | ({32} if vocab_size >= 32 * 2048 else set())
    best = min(space.microseconds(Plan(tile, *cut(vocab_size, n, tile.depth))) for n in powers)
    assert space.microseconds(Plan(tile, splits, length)) < 0.9 * best


def test_other_contractions_have_powers_of_two() -> None:
    for contraction in (576, 3072, 16384, 32767):
        for tile in (*TILES, *MATRIX_TILES):
            splits = PlanSpace(128, 576, contraction, (tile,)).splits(tile)
            assert splits == [n for n in (1, 2, 4, 8) if contraction // n >= 96 or n == 1]
        for tile in DECODED_TILES:
            splits = PlanSpace(128, 576, contraction, (tile,)).splits(tile)
            assert splits == ([1] if 576 * contraction < 8 << 20 else [1, 2, 4, 8])


@pytest.mark.parametrize("contraction", [28672, 14336, 4096])
def test_few_rows_of_a_large_matrix_are_decoded_first_and_in_stretches(contraction: int) -> None:
    """Llama 8B at 1 × 512: 128 workgroups of its own a product would have, one a multiprocessor."""
    few = candidates(PlanSpace(512, 4096, contraction, (*MATRIX_TILES, *DECODED_TILES)))
    assert few[0].tile.body == "decoded" and few[0].splits == 2
    assert {plan.tile.body for plan in few} == {"decoded", "matrix"}


def test_a_heads_gradient_is_decoded_first_and_in_stretches() -> None:
    """512 rows of LFM2 1.2B: tiles that decode a vocabulary of weights twice took 801 µs."""
    space = PlanSpace(512, 2048, 65536, (*MATRIX_TILES, *DECODED_TILES))
    plan = ranked_plans(space)[0]
    assert plan.tile.body == "decoded" and plan.splits > 1
    assert space.microseconds(plan) < 0.95 * min(
        space.microseconds(plan) for plan in ranked_plans(space) if plan.tile.body == "matrix"
    )


def test_pairs_are_made_beforehand_for_many_rows() -> None:
    """What both passes over x and W take is in the model; where rows are few it decides."""
    tiles = (*TILES, *PAIRED_TILES, *PREPARED_TILES)
    for rows, columns, contraction in ((4096, 4096, 4096), (512, 28672, 4096), (2048, 4096, 14336)):
        plan = choose_plan(PlanSpace(rows, columns, contraction, tiles))
        assert plan.tile.body == "prepared"
    few = candidates(PlanSpace(512, 8192, 2048, tiles))
    assert {plan.tile.body for plan in few} == {"prepared", "paired", "tiled"}
    assert few[0] == choose_plan(PlanSpace(512, 8192, 2048, tiles))
    space = PlanSpace(32, 4096, 4096, tiles)
    assert choose_plan(space).tile.body != "prepared"
    plan = Plan(PREPARED_TILES[0], 1, 4096)
    passes = 2.0 * (32 + 4096) * 4096 / 1e6
    work = 128 * max(plan.tile.latency, plan.tile.work)
    assert space.microseconds(plan) == pytest.approx(7.0 + passes + work)


@pytest.mark.parametrize("columns", [4, 4096])
def test_stretches_keep_within_their_memory(columns: int) -> None:
    """At most 32, and no more partial sums than scratch memory holds."""
    for rows in (1, 64, 4096):
        for tile in (*MATRIX_TILES, *DECODED_TILES):
            splits = PlanSpace(rows, columns, 262144, (tile,)).splits(tile)
            assert splits[0] == 1 and splits[-1] <= 32
            assert all(n == 1 or n * rows * columns <= MOST_PARTIAL_SUMS for n in splits)
