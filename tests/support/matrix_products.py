"""Products by the bodies for matrix units against float64: what their tests share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from lora.backward.matmul import Dropped, matmul_backward
from lora.forward.dropout import GroupDropout, mask, scale_of
from lora.forward.matmul import matmul
from lora.forward.matmul_paired import carry_of, row_scales
from lora.forward.model.factors import LoraFactors
from lora.forward.model.weights import load_matrix
from lora.forward.part_product import SizedRows
from lora.forward.plans.matmul_plans import Request
from lora.forward.plans.matmul_tiles import MatrixTile, Plan, cut
from lora.forward.product import Product, ScaledColumns
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.half_tensors import needs_halves
from tests.support.kernels import MARKER, extent_in_use, run_twice
from tests.support.quantized_tensors import dequantized, random_blocks, tensor_of
from tests.support.renderings import Kind

Q8_0 = GGMLQuantizationType.Q8_0
SCALE = 1.5


def with_tile(
    recording: Recording, tile: MatrixTile, splits: int = 1, *, on_software: bool = False
) -> Recording:
    """As training has it, f16 or in pairs of f16, all products by one tile."""
    if tile.body == "matrix":
        needs_halves(recording.facts)
    if recording.facts.info["adapter_type"] == "CPU" and not on_software:
        pytest.skip("software drivers would compile it for minutes: test_on_any_driver is for them")
    if tile.workgroup_bytes > recording.facts.workgroup_memory:
        pytest.skip(f"workgroups have {recording.facts.workgroup_memory} bytes of memory")

    def plans(request: Request) -> Plan:
        return Plan(tile, *cut(request.constants["contraction"], splits, tile.depth))

    precision = "f16" if tile.body == "matrix" else "f32"
    return replace(recording, precision=precision, body=tile.body, plans=plans)


@dataclass(frozen=True)
class Case:
    """A product with everything that may come with it.

    Attributes:
        in_use: rows of the `rows` that hold something.
        ranges: of the adapted members.
        parts: tensor types of the parts, `n_out` rows each.
        x_type, out_type: under f16; in pairs both are f32.
        dropout: its probability, before each member's A: of the backward.
        sized: whether rows of d_y, of f32, are scaled for their tiles.
        scaled: whether columns of y are scaled on the way out.
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
    dropout: float = 0.0
    sized: bool = False
    scaled: bool = False

    def share(self, d_z: np.ndarray, a: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """What comes through the members' A to d_x [rows, n_in]."""
        total = np.zeros((len(d_z), self.n_in))
        for member in range(len(self.ranges)):
            low = slice(member * self.rank, (member + 1) * self.rank)
            own = d_z[:, low] @ a[low]
            if self.dropout:
                own *= mask(keys, member + 5, self.n_in, self.dropout) * scale_of(self.dropout)
            total += own
        return total


def check(recording: Recording, case: Case) -> None:
    """Both directions. Factors are rounded to f16 as the kernel does: what is left is f32's."""
    half = recording.half_products
    if not half:
        case = replace(case, x_type="f32", out_type="f32")

    def rounded(values: np.ndarray) -> np.ndarray:
        """As the tiles hold them, f64."""
        return values.astype(np.float16 if half else np.float32).astype(np.float64)

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
    out, d_x, kept = (
        recording.memory.empty((case.rows, n), case.out_type, extent=extent)
        for n in (n_out, case.n_in, n_out)
    )
    scales = rng.uniform(0.5, 2, n_out).astype(np.float32)
    columns = ScaledColumns(recording.memory.upload(scales), kept) if case.scaled else None
    product = Product(
        x_t, matrix, lora=lora if case.ranges else None, z=z_t if case.ranges else None,
        bias=recording.memory.upload(bias) if case.bias else None,
        residual=past_t if case.residual else None, softcap=case.softcap,
        scaled=columns,
    )  # fmt: skip
    forward, backward = Program(recording), Program(recording)
    matmul(forward, product, out=out)
    keys, dropout = rng.integers(0, 2**32, case.rows, np.uint32), None
    if case.dropout:
        rows = recording.memory.empty((case.rows,), "u32", extent=extent)
        recording.memory.write(rows, keys)
        matrices = recording.memory.constant_uniform((5, 6, 7, 8))
        dropout = GroupDropout(case.dropout, rows, matrices)
    largest = row_scales(backward, d_y_t, 6, "d_y") if case.sized else None
    matmul_backward(
        backward, SizedRows(d_y_t, largest), matrix, lora=product.lora,
        d_z=Dropped(d_z_t, dropout) if dropout else d_z_t if case.ranges else None, out=d_x,
    )  # fmt: skip
    expected, size = rounded(x) @ w.T, np.abs(rounded(x)) @ np.abs(w).T
    first = 0
    for member, (start, stop) in enumerate(case.ranges):
        own = rounded(z)[:, member * case.rank : (member + 1) * case.rank]
        factor = rounded(np.float32(SCALE) * b[first : first + stop - start])
        expected[:, start:stop] += own @ factor.T
        size[:, start:stop] += np.abs(own) @ np.abs(factor).T
        first += stop - start
    before = (forward, kept, expected.copy(), size.copy())
    if case.scaled:
        expected, size = scales * expected, scales * size
    expected += bias * case.bias
    if case.softcap is not None:
        expected = case.softcap * np.tanh(expected / case.softcap)
    expected += past * case.residual
    size += np.abs(bias) * case.bias + np.abs(past) * case.residual
    d_expected = rounded(d_y) @ w + case.share(rounded(d_z), rounded(a), keys)
    d_size = np.abs(rounded(d_y)) @ np.abs(w)
    d_size += case.share(np.abs(rounded(d_z)), np.abs(rounded(a)), keys)
    results = [(forward, out, expected, size), (backward, d_x, d_expected, d_size)]
    if case.scaled:
        results.append(before)
    for program, tensor, wanted, magnitude in results:
        templates = {dispatch.template for dispatch in program.dispatches}
        made = {"pair_rows", "pair_weights"}
        assert templates - {"matmul_reduce", "largest_of_rows", *made} == {"matmul_matrix"}
        exact = {kind.name for kind in case.parts} == {"F16"}
        prepared = recording.body == "prepared"
        of_pairs = {"pair_rows"} if exact else made
        assert templates & made == (of_pairs if prepared else set())
        sized = not half or (case.x_type == "f32" and (program is forward or case.sized))
        assert ("largest_of_rows" in templates) == (sized and not prepared)
        marks = np.full(tensor.shape, MARKER, np.float32)
        found = run_twice(program, tensor, marks).astype(np.float64)
        # A sum of some hundred f32, and decoded weights that lie on the edge between two f16.
        # In pairs three roundings to 2^-23 of each product, their signs random; and a GPU's units
        # truncate over the steps that are not carried yet: some 24 times, where an H200 was off by
        # 1.14 · 2^-20 after 16.
        truncated = not half and recording.facts.has_matrix_units
        bound = (2.0**-19 if truncated else 2.0**-20) * magnitude
        bound += 2.0**-11 * np.abs(wanted) * (case.out_type == "f16")
        bound += 2.0**-11 * magnitude / np.sqrt(case.n_in) * half + 1e-7
        used = slice(case.in_use)
        beyond = np.abs(found - wanted)[used] / bound[used]
        assert beyond.max() < 1, f"{beyond.max():.2f} times the bound, mean {beyond.mean():.2f}"
        assert (found[case.in_use :] == marks.astype(tensor.numpy_dtype)[0, 0]).all()


def check_tiles_fit(tiles: Sequence[MatrixTile], kinds: Sequence[Kind]) -> None:
    """Every lane of these kinds of units fetches whole eights; sums are carried between steps."""
    for kind in kinds:
        (shape,) = kind.matrix_shapes
        for tile in tiles:
            subgroups = tile.tile_rows // tile.lane_rows * (tile.tile_columns // tile.lane_columns)
            lanes = subgroups * shape.most_lanes
            assert lanes <= 256 and tile.workgroup_bytes <= 49152
            assert tile.depth * tile.tile_rows % (8 * lanes) == 0
            assert tile.depth * tile.tile_columns % (8 * lanes) == 0
            assert all(carry_of(terms) % tile.depth == 0 for terms in (32, 4096))
            assert tile.depth % shape.k == 0
    assert len({tile.name for tile in tiles}) == len(tiles)
