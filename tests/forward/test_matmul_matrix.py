"""The body for matrix units against float64: on such units where there are, else in plain WGSL."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from lora.backward.matmul import matmul_backward
from lora.forward.matmul import matmul
from lora.forward.model.factors import LoraFactors
from lora.forward.model.weights import load_matrix
from lora.forward.plans.matmul_plans import Request
from lora.forward.plans.matmul_tiles import MATRIX_TILES, MatrixTile, Plan, cut
from lora.forward.product import Product
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

Q8_0, F16 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16
SMALL, SMALLEST = MATRIX_TILES[-1], MatrixTile(32, 32, 16, 32, 16)
SCALE = 1.5


def with_tile(
    recording: Recording, tile: MatrixTile, splits: int = 1, *, on_software: bool = False
) -> Recording:
    """As f16 training has it, all products by one tile."""
    needs_halves(recording.facts)
    if recording.facts.info["adapter_type"] == "CPU" and not on_software:
        pytest.skip("software drivers would compile it for minutes: test_on_any_driver is for them")
    if tile.workgroup_bytes > recording.facts.workgroup_memory:
        pytest.skip(f"workgroups have {recording.facts.workgroup_memory} bytes of memory")

    def plans(request: Request) -> Plan:
        return Plan(tile, *cut(request.constants["contraction"], splits, tile.depth))

    return replace(recording, precision="f16", body="matrix", plans=plans)


@dataclass(frozen=True)
class Case:
    """A product with everything that may come with it.

    Attributes:
        in_use: rows of the `rows` that hold something.
        ranges: of the adapted members.
        parts: tensor types of the parts, `n_out` rows each.
    """

    rows: int = 70
    in_use: int = 67
    n_out: int = 100
    n_in: int = 224
    rank: int = 4
    ranges: tuple[tuple[int, int], ...] = ((8, 44), (60, 100))
    parts: tuple[GGMLQuantizationType, ...] = (Q8_0,)
    x_type: str = "f16"
    out_type: str = "f16"
    bias: bool = False
    residual: bool = False
    softcap: float | None = None


def rounded(values: np.ndarray) -> np.ndarray:
    """As the tiles hold them, f64."""
    return values.astype(np.float16).astype(np.float64)


def check(recording: Recording, case: Case) -> None:
    """Both directions. Factors are rounded to f16 as the kernel does: what is left is f32's."""
    rng = np.random.default_rng(0)
    tensors = [
        tensor_of(kind, random_blocks(kind, case.n_out, case.n_in, seed), case.n_in)
        for seed, kind in enumerate(case.parts)
    ]
    w = rounded(np.concatenate([dequantized(tensor) for tensor in tensors]))
    matrix = load_matrix(recording, tensors)
    n_out = case.n_out * len(case.parts)
    width = case.rank * len(case.ranges)
    extent = extent_in_use(recording, case.rows, case.in_use)

    def rows_of(columns: int, dtype: str) -> tuple[np.ndarray, Any]:
        values = rng.normal(size=(case.rows, columns)).astype(np.float32)
        tensor = recording.memory.empty(values.shape, dtype, extent=extent)
        recording.memory.write(tensor, values)
        return values.astype(tensor.numpy_dtype).astype(np.float64), tensor

    (x, x_t), (d_y, d_y_t) = (rows_of(n, case.x_type) for n in (case.n_in, n_out))
    (z, z_t), (d_z, d_z_t), (past, past_t) = (rows_of(n, "f32") for n in (width, width, n_out))
    a = rng.normal(size=(width, case.n_in)).astype(np.float32)
    n_features = sum(stop - start for start, stop in case.ranges)
    b = rng.normal(size=(n_features, case.rank)).astype(np.float32)
    bias = rng.normal(size=n_out).astype(np.float32)
    lora = LoraFactors(
        recording.memory.upload(a), recording.memory.upload(b), case.rank, SCALE, case.ranges
    )
    out, d_x = (
        recording.memory.empty((case.rows, n), case.out_type, extent=extent)
        for n in (n_out, case.n_in)
    )
    product = Product(
        x_t, matrix, lora=lora if case.ranges else None, z=z_t if case.ranges else None,
        bias=recording.memory.upload(bias) if case.bias else None,
        residual=past_t if case.residual else None, softcap=case.softcap,
    )  # fmt: skip
    forward, backward = Program(recording), Program(recording)
    matmul(forward, product, out=out)
    matmul_backward(
        backward, d_y_t, matrix, lora=product.lora, d_z=d_z_t if case.ranges else None, out=d_x
    )
    expected, size = rounded(x) @ w.T, np.abs(rounded(x)) @ np.abs(w).T
    first = 0
    for member, (start, stop) in enumerate(case.ranges):
        own = rounded(z)[:, member * case.rank : (member + 1) * case.rank]
        factor = rounded(np.float32(SCALE) * b[first : first + stop - start])
        expected[:, start:stop] += own @ factor.T
        size[:, start:stop] += np.abs(own) @ np.abs(factor).T
        first += stop - start
    expected += bias * case.bias
    if case.softcap is not None:
        expected = case.softcap * np.tanh(expected / case.softcap)
    expected += past * case.residual
    size += np.abs(bias) * case.bias + np.abs(past) * case.residual
    d_expected = rounded(d_y) @ w + rounded(d_z) @ rounded(a) * bool(case.ranges)
    d_size = np.abs(rounded(d_y)) @ np.abs(w) + np.abs(rounded(d_z)) @ np.abs(rounded(a))
    results = ((forward, out, expected, size), (backward, d_x, d_expected, d_size))
    for program, tensor, wanted, magnitude in results:
        assert {d.template for d in program.dispatches} <= {"matmul_matrix", "matmul_reduce"}
        marks = np.full(tensor.shape, MARKER, np.float32)
        found = run_twice(program, tensor, marks).astype(np.float64)
        # A sum of some hundred f32, and decoded weights that lie on the edge between two f16.
        bound = 2.0**-20 * magnitude + 2.0**-11 * np.abs(wanted) * (case.out_type == "f16")
        bound += 2.0**-11 * magnitude / np.sqrt(case.n_in) + 1e-7
        worst = np.abs(found - wanted)[: case.in_use] - bound[: case.in_use]
        assert worst.max() < 0
        assert (found[case.in_use :] == marks.astype(tensor.numpy_dtype)[0, 0]).all()


@pytest.mark.parametrize(
    ("case", "splits"),
    [
        (Case(1, 1, 4, 32, ranges=(), parts=(F16,)), 1),
        (Case(33, 32, 68, 100, ranges=(), parts=(F16,), bias=True, residual=True,
              out_type="f32"), 2),
        (Case(20, 19, 36, 64, rank=20, ranges=((4, 32),), x_type="f32"), 1),
        (Case(20, 20, 36, 64, ranges=((8, 44), (60, 72)), parts=(Q8_0, F16), out_type="f32"), 1),
    ],
    ids=["one row", "stretches", "a large rank", "two parts"],
)  # fmt: skip
def test_on_any_driver(recording: Recording, case: Case, splits: int) -> None:
    """A tile so small that software drivers compile it in seconds."""
    check(with_tile(recording, SMALLEST, splits, on_software=True), case)


@pytest.mark.parametrize("tile", MATRIX_TILES, ids=lambda tile: tile.name)
def test_every_tile(recording: Recording, tile: MatrixTile) -> None:
    check(with_tile(recording, tile), Case())


@pytest.mark.parametrize("splits", [2, 3])
def test_stretches(recording: Recording, splits: int) -> None:
    check(with_tile(recording, SMALL, splits), Case(bias=True, residual=True, out_type="f32"))


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, 4, 32, ranges=(), parts=(F16,)),
        Case(33, 33, 68, 100, rank=20, ranges=((0, 68),), parts=(F16,)),
        Case(40, 39, 64, 32, rank=40, ranges=((4, 12), (12, 64))),
        Case(bias=True, softcap=7.0, out_type="f32", x_type="f32"),
        Case(residual=True, out_type="f32"),
        Case(parts=(Q8_0, F16), ranges=((8, 44), (60, 132)), bias=True, out_type="f32"),
    ],
    ids=["one row", "odd widths", "large ranks", "head", "residual", "two parts"],
)
def test_shapes_and_what_comes_after(recording: Recording, case: Case) -> None:
    check(with_tile(recording, SMALL), case)


@pytest.mark.parametrize("kind", ALL_TYPES, ids=type_name)
def test_every_type(recording: Recording, kind: GGMLQuantizationType) -> None:
    """Below 65504 they are: blocks of random bits have scales of any size."""
    check(
        with_tile(recording, SMALL), Case(20, 20, 36, 256, ranges=(), parts=(kind,), out_type="f32")
    )
