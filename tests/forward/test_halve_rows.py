"""Copies in f16 of a prompt's rows: what they hold, who takes them, that no bit depends on it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from lora.checks.references.rmsnorm import scaled_halves
from lora.forward import halve_rows as forward_halve_rows
from lora.forward.halve_rows import LEAST_ROWS, halve_rows, takes_row_copies
from lora.forward.matmul import matmul
from lora.forward.matmul_matrix import EMULATED
from lora.forward.model.factors import LoraFactors
from lora.forward.model.weights import load_matrix
from lora.forward.plans.matmul_plans import Request
from lora.forward.plans.matmul_tiles import MatrixTile, Plan, cut
from lora.forward.product import Product
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.attention_cuts import on_matrix_units
from tests.support.kernels import activation, extent_in_use, with_facts
from tests.support.quantized_tensors import random_blocks, tensor_of

ROWS, IN_USE = 70, 67
SMALLEST = MatrixTile(32, 32, 16, 32, 16)


def by_smallest_tile(request: Request) -> Plan:
    """What software compiles soonest."""
    return Plan(SMALLEST, *cut(request.constants["contraction"], 1, SMALLEST.depth))


def rows_of_all_sizes(columns: int) -> np.ndarray:
    """Rows from 1e-30 to 1e30; those not in use hold NaN."""
    rng = np.random.default_rng(columns)
    x = rng.normal(size=(ROWS, columns)) * 10.0 ** rng.integers(-30, 31, (ROWS, 1))
    x[IN_USE:] = np.nan
    return x.astype(np.float32)


@pytest.mark.parametrize("columns", [8, 264, 4104])
def test_against_numpy(recording: Recording, columns: int) -> None:
    x, extent = rows_of_all_sizes(columns), extent_in_use(recording, ROWS, IN_USE)
    x[3] = 0.0
    program = Program(recording)
    sized = halve_rows(program, activation(recording, x, extent), label="x")
    assert sized.halves is not None and sized.largest is not None
    program.run()
    found = recording.memory.read(sized.halves)[:IN_USE]
    # Rounded once: WGSL leaves open which of the two neighbours it is.
    np.testing.assert_allclose(found, scaled_halves(x[:IN_USE]), rtol=2**-10, atol=2**-24)
    sizes = recording.memory.read(sized.largest).view(np.float32)
    assert (sizes[:IN_USE] == np.abs(x[:IN_USE]).max(axis=1)).all()


def test_what_is_no_number_stays_none(recording: Recording) -> None:
    x, extent = rows_of_all_sizes(64), extent_in_use(recording, ROWS, IN_USE)
    x[5, 7], x[6, 8], x[7, 9] = np.nan, np.inf, -np.inf
    program = Program(recording)
    sized = halve_rows(program, activation(recording, x, extent), label="x")
    assert sized.halves is not None
    program.run()
    found = recording.memory.read(sized.halves)[:IN_USE]
    assert (np.isfinite(found) == np.isfinite(x[:IN_USE])).all()


def test_a_product_has_the_same_bits(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an adapted matrix, as tiles make them of f32."""
    halves = replace(
        on_matrix_units(recording), precision="f32", products="f16", plans=by_smallest_tile
    )
    rng, memory = np.random.default_rng(1), recording.memory
    kind = GGMLQuantizationType.F32
    matrix = load_matrix(halves, [tensor_of(kind, random_blocks(kind, 72, 224, 0), 224)])
    extent = extent_in_use(recording, ROWS, IN_USE)
    rows = rows_of_all_sizes(224)
    x, z = (activation(recording, part, extent) for part in (rows, rows[:, :4].copy()))
    a, b = (memory.upload(rng.normal(size=size)) for size in ((4, 224), (40, 4)))
    product = Product(x, matrix, lora=LoraFactors(a, b, 4, 1.5, ((8, 48),)), z=z)
    found = []
    for least in (LEAST_ROWS, 1):
        monkeypatch.setattr(forward_halve_rows, "LEAST_ROWS", least)
        program = Program(halves)
        out = matmul(program, product)
        templates = [d.template for d in program.dispatches]
        sizing = "largest_of_rows" if least > 1 else "halve_rows"
        assert templates == [sizing, "matmul_matrix"]
        program.run()
        found.append(memory.read(out)[:IN_USE])
    assert np.isfinite(found[0]).all() and found[0].tobytes() == found[1].tobytes()


def test_who_takes_them(recording: Recording) -> None:
    on_units = replace(
        with_facts(
            recording, is_cpu=False, matrix_shapes=(EMULATED,), most_storage_buffers=32,
            features=recording.facts.features | {"shader-f16"},
        ),
        products="f16",
    )  # fmt: skip
    many, few, odd = (
        recording.memory.empty((rows, columns))
        for rows, columns in ((LEAST_ROWS, 64), (LEAST_ROWS - 1, 64), (LEAST_ROWS, 36))
    )
    assert takes_row_copies(on_units, many, 4)
    for other, x in (
        (on_units, few),
        (on_units, odd),
        (replace(on_units, products=None), many),
        (replace(on_units, products="f32"), many),
        (replace(on_units, precision="f16"), many),  # training
        (replace(on_units, body="tiled"), many),
        (with_facts(on_units, matrix_shapes=()), many),
        (with_facts(on_units, is_cpu=True), many),
        (with_facts(on_units, most_storage_buffers=4), many),
    ):
        assert not takes_row_copies(other, x, 4)
