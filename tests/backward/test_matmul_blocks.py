"""A gradient that is f16 in blocks, and which heads have one: to the bits of one that is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from lora.backward.matmul import matmul_backward
from lora.forward.cross_entropy import GPU_BLOCK, Objective, cross_entropy, gradient_in_blocks
from lora.forward.matmul_matrix import takes_blocks
from lora.forward.model.weights import FrozenMatrix, load_matrix
from lora.forward.part_product import InBlocks
from lora.forward.plans.matmul_tiles import MATRIX_TILES, MatrixTile
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor
from tests.support.kernels import MARKER, activation, extent_in_use, marked, with_facts
from tests.support.matrix_products import with_tile
from tests.support.quantized_tensors import dequantized, random_blocks, tensor_of

SMALLEST = MatrixTile(32, 32, 16, 32, 16)
ROWS, IN_USE, N_IN = 35, 33, 68


def matrix_of(recording: Recording, n_out: int, kind: str = "F16") -> tuple[FrozenMatrix, Any]:
    """A matrix, and its numbers."""
    quantization = GGMLQuantizationType[kind]
    n_in = N_IN if kind == "F16" else 96
    tensor = tensor_of(quantization, random_blocks(quantization, n_out, n_in, 0), n_in)
    return load_matrix(recording, [tensor]), dequantized(tensor)


def backward(recording: Recording, d_y: Tensor | InBlocks, matrix: FrozenMatrix) -> np.ndarray:
    """d_x of the product, run; f32."""
    program = Program(recording)
    extent = (d_y.tensor if isinstance(d_y, InBlocks) else d_y).extent
    out = recording.memory.empty((ROWS, matrix.in_features), extent=extent)
    recording.memory.write(out, np.full(out.shape, MARKER, np.float32))
    matmul_backward(program, d_y, matrix, out=out)
    program.run()
    assert program.dispatches[0].template == "matmul_matrix"
    return recording.memory.read(out)


def check(recording: Recording, block: int, n_out: int, kind: str, parts: int = 1) -> None:
    """The same bits as of f16 without blocks, and right."""
    matrix, w = matrix_of(recording, n_out, kind)
    if parts > 1:
        of_part = matrix.n_bytes // n_out * block
        matrix, w = matrix_of(with_facts(recording, max_binding=of_part), n_out, kind)
        assert [part.out_features for part in matrix.parts] == [block] * parts
    extent = extent_in_use(recording, ROWS, IN_USE)
    rng = np.random.default_rng(n_out)
    d_y = rng.normal(size=(ROWS, n_out)).astype(np.float16)
    column = np.arange(n_out)
    apart = np.full((ROWS, 2 * n_out), np.nan, np.float16)  # what is stale may be anything
    apart[:, column + column // block * block] = d_y
    found = []
    for values in (d_y, apart):
        tensor = recording.memory.empty(values.shape, "f16", extent=extent)
        recording.memory.write(tensor, values)
        given = tensor if values is d_y else InBlocks(tensor, block)
        found.append(backward(recording, given, matrix))
    whole, in_blocks = found
    assert in_blocks.tobytes() == whole.tobytes()
    used = d_y[:IN_USE].astype(np.float64)
    size = np.abs(used) @ np.abs(w)
    assert (np.abs(in_blocks[:IN_USE] - used @ w) <= 2.0**-9 * size / np.sqrt(n_out)).all()
    assert (in_blocks[IN_USE:] == MARKER).all()


@pytest.mark.parametrize(
    ("block", "n_out", "splits", "kind", "parts"),
    [(64, 192, 1, "F16", 1), (128, 320, 3, "Q8_0", 1), (64, 192, 1, "Q8_0", 3)],
    ids=["one pass", "stretches", "parts"],
)
def test_on_any_driver(
    recording: Recording, block: int, n_out: int, splits: int, kind: str, parts: int
) -> None:
    check(with_tile(recording, SMALLEST, splits, on_software=True), block, n_out, kind, parts)


@pytest.mark.parametrize("tile", MATRIX_TILES, ids=lambda tile: tile.name)
def test_every_tile(recording: Recording, tile: MatrixTile) -> None:
    check(with_tile(recording, tile), 256, 832, "Q8_0")
    check(with_tile(recording, tile, 4), 128, 640, "F16")


def test_of_the_loss_itself(recording: Recording) -> None:
    """What the loss leaves in f16 and in f32 gives one gradient, as tiles round to f16 anyway."""
    on_units = with_tile(recording, SMALLEST, 4, on_software=True)
    vocab_size = GPU_BLOCK + 64
    matrix, _ = matrix_of(on_units, vocab_size)
    extent = extent_in_use(recording, ROWS, IN_USE)
    rng = np.random.default_rng(3)
    logits = 5 * rng.normal(size=(ROWS, vocab_size)).astype(np.float32)
    labels = activation(recording, rng.integers(0, vocab_size, ROWS), extent)
    weights = activation(recording, rng.normal(size=ROWS).astype(np.float32), extent)
    found = []
    for halves in (False, True):
        tensor = activation(recording, logits, extent)
        program = Program(with_facts(recording, is_cpu=False))
        cross_entropy(
            program, tensor, labels, marked(recording, extent), marked(recording, extent),
            Objective(weights, halves=halves),
        )  # fmt: skip
        program.run()
        given = gradient_in_blocks(tensor) if halves else tensor
        found.append(backward(on_units, given, matrix))
    assert np.abs(found[0][:IN_USE]).max() > 0
    assert found[0].tobytes() == found[1].tobytes()


def test_what_takes_blocks_and_what_is_refused(recording: Recording) -> None:
    on_units = replace(recording, precision="f16", body="matrix")
    matrix, _ = matrix_of(on_units, 128)
    narrow, _ = matrix_of(on_units, 160)
    assert takes_blocks(on_units, matrix, 64)
    assert not takes_blocks(on_units, matrix, 96)  # a column's place is found by its bits
    assert not takes_blocks(on_units, matrix, 32)  # tiles reach further
    assert not takes_blocks(on_units, narrow, 64)
    in_parts, _ = matrix_of(with_facts(on_units, max_binding=64 * 136), 128)
    assert takes_blocks(on_units, in_parts, 64) and not takes_blocks(on_units, in_parts, 128)
    assert not takes_blocks(replace(on_units, precision="f32"), matrix, 64)
    assert not takes_blocks(replace(on_units, body="tiled"), matrix, 64)
    extent = extent_in_use(recording, ROWS, IN_USE)
    for of, dtype, block in (
        (on_units, "f32", 64), (on_units, "f16", 96), (replace(on_units, body="tiled"), "f16", 64),
    ):  # fmt: skip
        d_y = of.memory.empty((ROWS, 256), dtype, extent=extent)
        with pytest.raises(ValueError, match="in blocks"):
            matmul_backward(Program(of), InBlocks(d_y, block), matrix)
