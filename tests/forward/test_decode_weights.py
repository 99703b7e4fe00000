"""Matrices decoded into f16, against float64; products with them are those that decode in tiles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from lora.backward.matmul import matmul_backward
from lora.forward.decode_weights import decode_weights
from lora.forward.gguf.file import GGUFTensor
from lora.forward.matmul import matmul
from lora.forward.matmul_decoded import MOST_DECODED
from lora.forward.model.weights import load_matrix
from lora.forward.plans.matmul_plans import Request
from lora.forward.plans.matmul_tiles import DecodedTile, MatrixTile, Plan, cut
from lora.forward.product import Product
from lora.shaders.memory import CountingMemory
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.half_tensors import needs_halves
from tests.support.kernels import MARKER, extent_in_use, run_twice
from tests.support.quantized_tensors import (
    ALL_TYPES,
    dequantized,
    random_blocks,
    tensor_of,
    type_name,
)
from tests.support.renderings import LARGE_GPU, MATRIX_GPU, Kind

Type = GGMLQuantizationType
SIZES = (32, 32, 16, 32, 16)


@pytest.mark.parametrize("kind", ALL_TYPES, ids=type_name)
def test_every_type(recording: Recording, kind: Type) -> None:
    """Rounded once: to the nearest f16 of what float64 gives, or its neighbour on the edge."""
    rows, columns = 5, 256
    tensor = tensor_of(kind, random_blocks(kind, rows, columns, 0), columns)
    part = load_matrix(recording, [tensor]).parts[0]
    out = recording.memory.empty((rows + 1, columns // 2), "u32")
    program = Program(recording)
    within = replace(out, shape=(rows, columns // 2))
    decode_weights(program, part.words, part.quantization.name, out=within, label="w")
    words = run_twice(program, out, np.full(out.shape, 7, np.uint32))
    found = words[:rows].copy().view(np.float16).astype(np.float64)
    wanted = dequantized(tensor)
    assert (np.abs(found - wanted) <= 1.01 * 2.0**-11 * np.abs(wanted) + 2.0**-25).all()
    assert (words[rows:] == 7).all()


def products(
    recording: Recording, tile: MatrixTile, splits: int
) -> tuple[list[np.ndarray], set[str]]:
    """A product and its gradient by one tile, and the kernels of both."""
    rows, n_out, n_in = 21, 36, 64
    blocks = random_blocks(Type.Q8_0, n_out, n_in, 0)
    matrix = load_matrix(recording, [tensor_of(Type.Q8_0, blocks, n_in)])
    rng = np.random.default_rng(1)
    extent = extent_in_use(recording, rows, rows - 1)

    def plans(request: Request) -> Plan:
        return Plan(tile, *cut(request.constants["contraction"], splits, tile.depth))

    own = replace(recording, precision="f16", body="matrix", plans=plans)
    found, templates = [], set()
    for columns, width in ((n_in, n_out), (n_out, n_in)):
        x = recording.memory.empty((rows, columns), "f16", extent=extent)
        recording.memory.write(x, rng.normal(size=x.shape).astype(np.float32))
        out = recording.memory.empty((rows, width), "f32", extent=extent)
        program = Program(own)
        if columns == n_in:
            matmul(program, Product(x, matrix), out=out)
        else:
            matmul_backward(program, x, matrix, out=out)
        templates |= {dispatch.template for dispatch in program.dispatches}
        found.append(run_twice(program, out, np.full(out.shape, MARKER, np.float32)))
    return found, templates


@pytest.mark.parametrize("splits", [1, 2])
def test_the_same_to_the_last_bit(recording: Recording, splits: int) -> None:
    """Of tiles that software drivers compile in seconds; test_matmul_matrix.py has float64's."""
    needs_halves(recording.facts)
    in_tiles, templates = products(recording, MatrixTile(*SIZES), splits)
    assert "decode_weights" not in templates
    beforehand, templates = products(recording, DecodedTile(*SIZES), splits)
    assert {"decode_weights", "matmul_matrix"} <= templates
    assert ("matmul_reduce" in templates) == (splits > 1)
    for ours, theirs in zip(beforehand, in_tiles, strict=True):
        assert (ours == theirs).all()


@pytest.mark.parametrize(
    ("kind", "rows", "type_", "size", "fits"),
    [
        (MATRIX_GPU, 2048, Type.Q4_K, 4096, [4096]),
        (MATRIX_GPU, 500, Type.Q4_K, 4096, []),
        (MATRIX_GPU, 2048, Type.F16, 4096, []),
        (MATRIX_GPU, 2048, Type.Q4_K, 12288, [8192, 4096]),
        (LARGE_GPU, 2048, Type.Q4_K, 4096, []),
    ],
    ids=["large", "few rows", "f16", "in parts", "no units"],
)
def test_where_it_is_offered(
    kind: Kind, rows: int, type_: Type, size: int, fits: list[int]
) -> None:
    """And that what fits asks for scratch memory for one matrix at a time."""
    requests: list[Request] = []

    def source(request: Request) -> Plan | None:
        requests.append(request)
        tiles = [tile for tile in request.tiles if tile.body == "decoded"]
        return Plan(tiles[0], *cut(size, 1, tiles[0].depth)) if tiles else None

    memory = CountingMemory(kind.facts)
    recording = Recording(kind.facts, memory, "f16", plans=source)
    nothing = np.zeros((0, 0), np.uint8)
    matrix = load_matrix(recording, [GGUFTensor("w", type_, (size, size), nothing)])
    extent = memory.extent(rows)
    program = Program(recording)
    for _ in range(2):
        x = memory.empty((rows, size), "f16", extent=extent)
        matmul(program, Product(x, matrix), out=memory.empty((rows, size), "f16", extent=extent))
    assert any(tile.body == "decoded" for tile in requests[0].tiles) == bool(fits)
    assert not fits or memory.allocated["scratch"] == 2 * size * fits[0]
    assert [part.out_features for part in matrix.parts] == (fits or [size])
    assert all(2 * size * rows_of_part <= MOST_DECODED < 2 * 12288**2 for rows_of_part in fits)
