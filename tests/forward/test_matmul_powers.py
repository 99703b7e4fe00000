"""Products of f16 whose numbers f16 does not hold: powers of two of W's rows and of x's."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from lora.backward.matmul import matmul_backward
from lora.checks.references.rmsnorm import scaled_halves
from lora.forward.matmul import matmul
from lora.forward.matmul_paired import row_scales
from lora.forward.model.factors import LoraFactors
from lora.forward.model.weights import FrozenMatrix, load_matrix
from lora.forward.part_product import SizedRows
from lora.forward.plans.matmul_plans import Request
from lora.forward.plans.matmul_tiles import MatrixTile, Plan, cut
from lora.forward.product import Product
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor
from tests.support.half_tensors import needs_halves
from tests.support.kernels import extent_in_use
from tests.support.quantized_tensors import dequantized, random_blocks, tensor_of

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
Q8_0 = GGMLQuantizationType.Q8_0
SMALLEST = MatrixTile(32, 32, 16, 32, 16)
SCALE = 1.5
BEHIND = (2.0**6, 2.0**-6)  # of the low-rank part, of what comes out


@dataclass(frozen=True)
class Case:
    """A product, `in_use` of `rows` rows; n_out rows of W in each part."""

    body: str
    parts: tuple[GGMLQuantizationType, ...]
    rows: int = 37
    in_use: int = 35
    n_out: int = 44
    n_in: int = 104
    splits: int = 1


def recorded(recording: Recording, case: Case) -> Recording:
    """Under f16, with the body and, of the matrix units', a tile that software compiles soon."""
    needs_halves(recording.facts)

    def plans(request: Request) -> Plan | None:
        depth = SMALLEST.depth
        return Plan(SMALLEST, *cut(request.constants["contraction"], case.splits, depth))

    on_units = case.body == "matrix"
    own = replace(recording, precision="f16", body=case.body, plans=plans if on_units else None)
    return replace(own, facts=replace(own.facts, is_cpu=False)) if case.body == "tiled" else own


def powered(recording: Recording, matrix: FrozenMatrix, powers: np.ndarray) -> FrozenMatrix:
    """The matrix with these powers of its rows, [out_features]."""
    parts = []
    for part in matrix.parts:
        own = powers[part.first_feature : part.first_feature + part.out_features]
        both = np.concatenate([own, BEHIND]).astype(np.float32)
        parts.append(replace(part, powers=recording.memory.upload(both)))
    return replace(matrix, parts=tuple(parts))


CASES = {
    "wide": Case("wide", (F32,)),
    "tiled": Case("tiled", (F32,)),
    "tiled, quantized, two parts": Case("tiled", (Q8_0, F32), n_in=96),
    "matrix": Case("matrix", (F32,)),
    "matrix, f16, two parts": Case("matrix", (F16, Q8_0), n_in=96),
    "matrix, stretches": Case("matrix", (F32,), splits=2),
    "matrix, one row": Case("matrix", (F32,), rows=1, in_use=1, n_out=20, n_in=32),
}


# Units in plain WGSL compile for seconds: of theirs every case has one type of x.
OF_BOTH = [(name, x_type) for name in list(CASES)[:3] for x_type in ("f32", "f16")]
ON_UNITS = [(name, ("f32", "f16")[i % 2]) for i, name in enumerate(list(CASES)[3:])]


@pytest.mark.parametrize(("name", "x_type"), OF_BOTH + ON_UNITS)
def test_both_directions(recording: Recording, name: str, x_type: str) -> None:
    """Rows of W from 2^-40 to 2^20 and rows of f32 from 1e-12 to 1e12, against float64."""
    case = CASES[name]
    recording = recorded(recording, case)
    memory, rng = recording.memory, np.random.default_rng(0)
    n_out = case.n_out * len(case.parts)
    sizes = 2.0 ** rng.integers(-40, 20, n_out)
    tensors = []
    for index, kind in enumerate(case.parts):
        data = random_blocks(kind, case.n_out, case.n_in, index)
        if kind == F32:
            own = sizes[index * case.n_out :][: case.n_out, None]
            data = (data.view(np.float32) * own.astype(np.float32)).view(np.uint8)
        else:
            sizes[index * case.n_out :][: case.n_out] = 1.0
        tensors.append(tensor_of(kind, data, case.n_in))
    w = np.concatenate([dequantized(tensor) for tensor in tensors]).astype(np.float64)
    powers = 1 / sizes
    matrix = powered(recording, load_matrix(recording, tensors), powers)
    extent = extent_in_use(recording, case.rows, case.in_use)

    def rows_of(columns: int, dtype: str, sizes: np.ndarray) -> tuple[np.ndarray, Tensor]:
        values = (rng.normal(size=(case.rows, columns)) * sizes).astype(np.float32)
        tensor = memory.empty(values.shape, dtype, extent=extent)
        memory.write(tensor, values)
        return values.astype(tensor.numpy_dtype).astype(np.float64), tensor

    of_rows = np.ones((case.rows, 1))
    if x_type == "f32" and case.body != "wide":
        of_rows = 10.0 ** rng.integers(-12, 12, (case.rows, 1))
    ranges = ((4, n_out - 8),)
    lora = LoraFactors(
        *(memory.upload(rng.normal(size=s).astype(np.float32))
          for s in ((8, case.n_in), (n_out - 12, 8))),
        8, SCALE, ranges,
    )  # fmt: skip
    (x, x_t), (d_y, d_y_t) = (rows_of(n, x_type, of_rows) for n in (case.n_in, n_out))
    (z, z_t), (d_z, d_z_t) = (rows_of(8, "f32", of_rows / BEHIND[0]) for _ in range(2))
    out, d_x = (memory.empty((case.rows, n), "f32", extent=extent) for n in (n_out, case.n_in))
    forward, backward = Program(recording), Program(recording)
    matmul(forward, Product(x_t, matrix, lora=lora, z=z_t), out=out)
    largest = row_scales(backward, d_y_t, 6, "d_y")
    matmul_backward(backward, SizedRows(d_y_t, largest), matrix, lora=lora, d_z=d_z_t, out=d_x)
    a, b = (memory.read(tensor).astype(np.float64) for tensor in (lora.a, lora.b))
    effective, low = powers[:, None] * w, BEHIND[0] * BEHIND[1]
    wanted = BEHIND[1] * x @ effective.T
    wanted[:, 4 : n_out - 8] += low * SCALE * z @ b.T
    size = BEHIND[1] * np.abs(x) @ np.abs(effective).T + 0.1 * np.abs(z).sum(axis=1)[:, None]
    d_wanted = BEHIND[1] * d_y @ effective + low * d_z @ a
    d_size = BEHIND[1] * np.abs(d_y) @ np.abs(effective) + low * np.abs(d_z) @ np.abs(a)
    size[:, 4 : n_out - 8] += low * SCALE * np.abs(z) @ np.abs(b).T
    for program, tensor, right, most in (
        (forward, out, wanted, size),
        (backward, d_x, d_wanted, d_size),
    ):
        program.run()
        found = memory.read(tensor)[: case.in_use]
        # Both factors are rounded to 2^-12 of themselves; the tiled body adds 32 products in f16.
        bound = 2**-10 if case.body != "tiled" else 2**-7
        assert np.isfinite(found).all()
        assert (np.abs(found - right[: case.in_use]) <= bound * most[: case.in_use]).all()


@pytest.mark.parametrize("name", list(CASES)[3:])
def test_a_copy_in_f16_gives_the_bits_of_its_rows(recording: Recording, name: str) -> None:
    """What a norm has written of the stream's gradient in place of what tiles make of it."""
    case = CASES[name]
    recording = recorded(recording, case)
    memory, rng = recording.memory, np.random.default_rng(0)
    n_out = case.n_out * len(case.parts)
    tensors = [
        tensor_of(kind, random_blocks(kind, case.n_out, case.n_in, index), case.n_in)
        for index, kind in enumerate(case.parts)
    ]
    matrix = load_matrix(recording, tensors)
    extent = extent_in_use(recording, case.rows, case.in_use)
    d_y = rng.normal(size=(case.rows, n_out)) * 10.0 ** rng.integers(-12, 12, (case.rows, 1))
    d_y = d_y.astype(np.float32)
    rows, halves = (memory.empty(d_y.shape, t, extent=extent) for t in ("f32", "f16"))
    d_z = memory.empty((case.rows, 8), "f32", extent=extent)
    for tensor, values in ((rows, d_y), (halves, scaled_halves(d_y)), (d_z, d_y[:, :8])):
        memory.write(tensor, values)
    a, b = (rng.normal(size=s).astype(np.float32) for s in ((8, case.n_in), (n_out - 12, 8)))
    lora = LoraFactors(memory.upload(a), memory.upload(b), 8, SCALE, ((4, n_out - 8),))
    found = []
    for copy in (None, halves):
        program = Program(recording)
        d_x = memory.empty((case.rows, case.n_in), "f32", extent=extent)
        largest = row_scales(program, rows, 6, "d_y")
        given = SizedRows(rows, largest, copy)
        matmul_backward(program, given, matrix, lora=lora, d_z=d_z, out=d_x)
        product = next(d for d in program.dispatches if d.template == "matmul_matrix")
        assert product.constants["x_type"] == ("f32" if copy is None else "f16")
        program.run()
        found.append(memory.read(d_x)[: case.in_use])
    assert np.abs(found[0]).min() > 0 and found[0].tobytes() == found[1].tobytes()


def test_only_units_take_a_copy(recording: Recording) -> None:
    case = CASES["tiled"]
    recording = recorded(recording, case)
    data = random_blocks(F32, case.n_out, case.n_in, 0)
    matrix = load_matrix(recording, [tensor_of(F32, data, case.n_in)])
    extent = recording.memory.extent(2)
    rows, halves = (
        recording.memory.empty((2, case.n_out), t, extent=extent) for t in ("f32", "f16")
    )
    given = SizedRows(rows, recording.memory.empty((2,), "u32"), halves)
    with pytest.raises(ValueError, match="no rows of f16 that are scaled"):
        matmul_backward(Program(recording), given, matrix)
