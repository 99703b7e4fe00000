"""Products of many rows with frozen matrices, in both directions and with every tile."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from gguf import GGMLQuantizationType

from lora.backward.matmul import Dropped, matmul_backward
from lora.checks.comparison import (
    Check,
    Comparison,
    NotHereError,
    compare,
    needs_half,
    same,
    spare_software,
    untouched,
    worst,
)
from lora.checks.references.matmul import error_bound, matmul_reference
from lora.checks.references.pairs import paired_numbers
from lora.checks.references.rmsnorm import scaled_halves
from lora.checks.tensors import (
    MARKER,
    activation,
    extent_in_use,
    frozen,
    normal,
    rounded,
    typed,
    typed_marked,
)
from lora.forward.dropout import GroupDropout, mask, row_keys, scale_of
from lora.forward.halve_rows import halve_rows
from lora.forward.matmul import matmul
from lora.forward.matmul_matrix import shape_on
from lora.forward.matmul_paired import largest_of_rows
from lora.forward.model.balance import record_row_bounds
from lora.forward.model.factors import LoraFactors
from lora.forward.model.weights import record_largest
from lora.forward.pairs import pair_rows, pair_weights
from lora.forward.part_product import Place, SizedRows
from lora.forward.plans.matmul_plans import Request
from lora.forward.plans.matmul_tiles import (
    HALF_TILES,
    MATRIX_TILES,
    PAIRED_TILES,
    PREPARED_TILES,
    TILES,
    MatrixTile,
    PairedTile,
    Plan,
    Tile,
    cut,
)
from lora.forward.product import Product
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

ROWS, IN_USE, RANK, SCALE = 67, 66, 4, 1.5
OUT_FEATURES, RANGES, KEYS = 68, ((0, 36), (40, 68)), (11, 12)


def check_matmul(
    recording: Recording,
    kind: GGMLQuantizationType,
    columns: int,
    tile: Tile | None,
    splits: int = 1,
    powered: bool = False,
    dropped: float = 0.0,
    copied: bool = False,
) -> Comparison:
    """y with its low-rank part, bias and residual, and d_x; with powers of W's rows, too.

    And with dropout of this probability before A, whose masks d_x has; of a gradient in f32 that
    is `copied` into f16, its rows scaled.

    In f16 a tile's numbers are rounded to 2^-12, and so is each addition to a sum of at most 32
    products. These walk to four such roundings of a product for each of the sum's sqrt(terms), and
    the worst of some thousand results is off by four times that: 16 · 2^-11 with |x · w|'s mean.
    """
    half = tile is not None and tile.item_bytes == 2
    if half:
        needs_half(recording)
    if tile is not None and tile.workgroup_bytes > recording.facts.workgroup_memory:
        raise NotHereError(f"workgroups have {recording.facts.workgroup_memory} bytes of memory")
    if isinstance(tile, MatrixTile):
        if shape_on(recording.facts) is None:
            raise NotHereError("no matrix units that multiply f16 and add f32")
        spare_software(recording)
    elif tile not in (None, TILES[0], HALF_TILES[0]):
        spare_software(recording)
    dtype = "f16" if half else "f32"

    def plan(request: Request) -> Plan | None:
        contraction = request.constants["contraction"]
        return None if tile is None else Plan(tile, *cut(contraction, splits, tile.depth))

    # Named, since matrix units would be offered the plain body's products, too.
    products = None if isinstance(tile, PairedTile) else dtype
    recording = replace(recording, precision=dtype, products=products, plans=plan)
    matrix, w = frozen(recording, kind, OUT_FEATURES, columns)
    if powered:
        powers = 2.0 ** (np.arange(OUT_FEATURES) % 5 - 2)
        behind = recording.memory.upload(np.concatenate([powers, [4.0, 0.25]]).astype(np.float32))
        matrix = replace(matrix, parts=(replace(matrix.parts[0], powers=behind),))
        w = 0.25 * powers[:, None] * w
    x, d_y = (rounded(normal(s, ROWS, n), dtype) for s, n in ((1, columns), (2, OUT_FEATURES)))
    z, d_z = normal(3, ROWS, 2 * RANK), normal(4, ROWS, 2 * RANK)
    a, b = normal(5, 2 * RANK, columns), normal(6, 64, RANK)
    bias, residual = normal(7, OUT_FEATURES), normal(8, ROWS, OUT_FEATURES)
    lora = LoraFactors(recording.memory.upload(a), recording.memory.upload(b), RANK, SCALE, RANGES)
    extent, program = extent_in_use(recording, ROWS, IN_USE), Program(recording)
    out, d_x = (typed_marked(recording, dtype, extent, n) for n in (OUT_FEATURES, columns))

    matmul(
        program,
        Product(
            typed(recording, x, dtype, extent),
            matrix,
            lora=lora,
            z=activation(recording, z, extent),
            bias=recording.memory.upload(bias),
            residual=activation(recording, residual, extent),
        ),
        out=out,
    )
    keys, dropout = row_keys(1, 2, [3, 4], [20, ROWS - 20]), None
    if dropped:
        uniform = recording.memory.constant_uniform(KEYS)
        dropout = GroupDropout(dropped, activation(recording, keys, extent), uniform)
    d_z_t = activation(recording, d_z, extent)
    given: Tensor | SizedRows = typed(recording, d_y, dtype, extent)
    if copied:
        sizes = recording.memory.upload(np.abs(d_y).max(axis=1).view(np.uint32))
        halves = typed(recording, scaled_halves(d_y).astype(np.float32), "f16", extent)
        given = SizedRows(typed(recording, d_y, "f32", extent), sizes, halves)
    matmul_backward(
        program, given, matrix, lora=lora,
        d_z=d_z_t if dropout is None else Dropped(d_z_t, dropout), out=d_x,
    )  # fmt: skip
    program.run()
    expected = matmul_reference(x, w, z, b, list(RANGES), RANK, SCALE) + bias + residual
    size = matmul_reference(np.abs(x), np.abs(w), np.abs(z), np.abs(b), list(RANGES), RANK, SCALE)
    exact = [
        (out, expected, size + np.abs(bias) + np.abs(residual), columns + RANK + 2),
        (
            d_x,
            d_y.astype(np.float64) @ w + _through_a(d_z, a, keys, dropped),
            np.abs(d_y) @ np.abs(w) + _through_a(np.abs(d_z), np.abs(a), keys, dropped),
            OUT_FEATURES + 2 * RANK,
        ),
    ]
    found = []
    for tensor, wanted, magnitude, terms in exact:
        bound = 2 * error_bound(magnitude, terms)
        if half:
            bound += 16 * 2.0**-11 * magnitude / np.sqrt(terms)
        result = recording.memory.read(tensor)
        found += [
            compare(result[:IN_USE], wanted[:IN_USE], bound=bound[:IN_USE]),
            untouched(result[IN_USE:]),
        ]
    return worst(*found)


def _through_a(d_z: np.ndarray, a: np.ndarray, keys: np.ndarray, dropped: float) -> np.ndarray:
    """Σ_g mask_g ∘ (d_z_g · A_g) / (1 − p), float64 [rows, columns]."""
    total = np.zeros((len(d_z), a.shape[1]))
    for member, key in enumerate(KEYS):
        low = slice(member * RANK, (member + 1) * RANK)
        own = d_z[:, low].astype(np.float64) @ a[low]
        if dropped:
            own *= mask(keys, key, a.shape[1], dropped) * scale_of(dropped)
        total += own
    return total


def check_largest_of_rows(recording: Recording) -> Comparison:
    """The exact bits, of some columns."""
    x = normal(1, ROWS, 100)
    extent, program = extent_in_use(recording, ROWS, IN_USE), Program(recording)
    out = recording.memory.upload(np.full(ROWS, MARKER, np.float32).view(np.uint32))
    place = Place(x_column=8, out_column=0)
    largest_of_rows(program, activation(recording, x, extent), 64, place, out=out, label="checked")
    program.run()
    found = recording.memory.read(out).view(np.float32)
    wanted = np.abs(x[:, 8:72]).max(axis=1)
    return worst(same(found[:IN_USE], wanted[:IN_USE]), untouched(found[IN_USE:]))


def check_halve_rows(recording: Recording) -> Comparison:
    """Sizes exactly, copies to one of f16's neighbours: rows of other sizes by other powers."""
    sizes = 2.0 ** np.linspace(-90, 90, ROWS).round()[:, None]
    x = (normal(1, ROWS, 264) * sizes).astype(np.float32)
    extent, program = extent_in_use(recording, ROWS, IN_USE), Program(recording)
    sized = halve_rows(program, activation(recording, x, extent), label="checked")
    assert sized.halves is not None and sized.largest is not None
    program.run()
    largest = np.abs(x[:IN_USE]).max(axis=1)
    powers = 2.0 ** (4 - np.floor(np.log2(largest.astype(np.float64))))
    found = recording.memory.read(sized.halves)[:IN_USE]
    return worst(
        same(recording.memory.read(sized.largest).view(np.float32)[:IN_USE], largest),
        compare(found, x[:IN_USE] * powers[:, None], rtol=2.0**-11, atol=2.0**-25),
    )


def check_row_bounds(recording: Recording, kind: GGMLQuantizationType) -> Comparison:
    """Sums of positive numbers in f32: some hundred roundings of each, which partly cancel."""
    matrix, w = frozen(recording, kind, OUT_FEATURES, 256)
    v, program = normal(1, 256), Program(recording)
    bounds = recording.memory.empty((OUT_FEATURES, 4))
    record_row_bounds(program, matrix.parts[0], recording.memory.upload(v), bounds)
    program.run()
    sizes = np.abs(w.astype(np.float64) * v)
    wanted = np.stack([(sizes**2).sum(axis=1), sizes.sum(axis=1), np.abs(w).max(axis=1)], axis=1)
    return compare(recording.memory.read(bounds)[:, :3], wanted, rtol=2.0**-17)


def check_largest_weights(recording: Recording, kind: GGMLQuantizationType) -> Comparison:
    """Decoded, so rounded twice at most."""
    matrix, w = frozen(recording, kind, OUT_FEATURES, 256)
    part, program = matrix.parts[0], Program(recording)
    largest = recording.memory.empty((OUT_FEATURES + 256,), "u32")
    record_largest(program, part.words, part.quantization, largest)
    program.run()
    found = recording.memory.read(largest).view(np.float32)
    wanted = np.concatenate([np.abs(w).max(axis=1), np.abs(w).max(axis=0)])
    return compare(found, wanted, rtol=2.0**-23)


def check_pair_rows(recording: Recording) -> Comparison:
    """The exact sizes, and pairs to 2^-23 of each number and, where these are small, of a row's."""
    x = normal(1, ROWS, 100)
    extent, program = extent_in_use(recording, ROWS, IN_USE), Program(recording)
    marks = np.full(ROWS, MARKER, np.float32).view(np.uint32)
    largest = recording.memory.upload(marks)
    out = recording.memory.upload(np.full((2, ROWS, 48), marks[0]))
    place = Place(x_column=8, out_column=0)
    x_tensor = activation(recording, x, extent)
    pair_rows(program, x_tensor, 76, place, largest=largest, out=out, label="checked")
    program.run()
    found = recording.memory.read(largest).view(np.float32)
    wanted = np.abs(x[:, 8:84]).max(axis=1)
    words = recording.memory.read(out)
    pairs = paired_numbers(words[:, :IN_USE], wanted[:IN_USE, None])
    padded = np.pad(x[:IN_USE, 8:84].astype(np.float64), ((0, 0), (0, 20)))
    return worst(
        same(found[:IN_USE], wanted[:IN_USE]),
        untouched(found[IN_USE:]),
        compare(pairs, padded, bound=_pair_bound(padded, wanted[:IN_USE, None])),
        untouched(words[:, IN_USE:].view(np.float32)),
    )


def check_pair_weights(
    recording: Recording, kind: GGMLQuantizationType, by_columns: bool
) -> Comparison:
    """As those of rows, but decoded, so rounded twice more at most."""
    matrix, w = frozen(recording, kind, OUT_FEATURES, 256)
    part, program = matrix.parts[0], Program(recording)
    largest = recording.memory.empty((OUT_FEATURES + 256,), "u32")
    record_largest(program, part.words, part.quantization, largest)
    out = recording.memory.empty((2, OUT_FEATURES + 4, 144), "u32")
    name = part.quantization.name
    pair_weights(
        program, part.words, name, largest, by_columns=by_columns, out=out, label="checked"
    )
    program.run()
    sizes = recording.memory.read(largest).view(np.float32)
    size = np.ones((OUT_FEATURES + 4, 288))
    if by_columns:
        size[:, :256] = sizes[OUT_FEATURES:]
    else:
        size[:OUT_FEATURES] = sizes[:OUT_FEATURES, None]
    padded = np.pad(w.astype(np.float64), ((0, 4), (0, 32)))
    bound = _pair_bound(padded, size) + 2.0**-22 * np.abs(padded)
    return compare(paired_numbers(recording.memory.read(out), size), padded, bound=bound)


def _pair_bound(numbers: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """2^-23 of a number; of the largest what is lost where numbers of f16 below 2^-14 are zeros.

    WebGPU leaves it to devices whether they are. The others lose 2^-39.
    """
    return 2.0**-23 * np.abs(numbers) + 2.0**-28 * largest


Q4_0, Q4_K, Q6_K, F16 = (GGMLQuantizationType[name] for name in ("Q4_0", "Q4_K", "Q6_K", "F16"))
CHECKS = [
    *(
        Check("matmul_wide", f"{ROWS}x{columns}x{OUT_FEATURES} {kind.name}",
              partial(check_matmul, kind=kind, columns=columns, tile=None), as_cpu=True)
        for kind, columns in ((Q4_K, 256), (F16, 100))
    ),
    *(
        Check("matmul_tiled", f"{ROWS}x{columns}x{OUT_FEATURES} {kind.name}",
              partial(check_matmul, kind=kind, columns=columns, tile=None))
        for kind, columns in ((Q6_K, 256), (F16, 100))
    ),
    *(
        Check("matmul_tiled", f"{tile.name} in {splits}{' f16' * (tile.item_bytes == 2)}",
              partial(check_matmul, kind=Q4_0, columns=224, tile=tile, splits=splits))
        for tiles in (TILES, HALF_TILES)
        for tile, splits in zip(tiles, (2, 1) * len(tiles), strict=False)
    ),
    *(
        Check("matmul_matrix", f"{tile.name} in {splits}",
              partial(check_matmul, kind=Q4_K, columns=256, tile=tile, splits=splits))
        for tile, splits in zip(MATRIX_TILES, (2, 1) * len(MATRIX_TILES), strict=False)
    ),
    *(
        Check("matmul_matrix", f"{tile.name} in {splits}",
              partial(check_matmul, kind=Q4_K, columns=768, tile=tile, splits=splits))
        for tiles in (PAIRED_TILES, PREPARED_TILES)
        for tile, splits in zip(tiles, (2, 1) * len(tiles), strict=False)
    ),
    *(
        Check(kernel, f"{OUT_FEATURES} powers, {'f32' if tile is None else tile.name}",
              partial(check_matmul, kind=Q4_K, columns=256, tile=tile, powered=True), as_cpu=as_cpu)
        for kernel, tile, as_cpu in (
            ("matmul_wide", None, True), ("matmul_tiled", HALF_TILES[0], False),
            ("matmul_matrix", MATRIX_TILES[-1], False),
        )
    ),
    Check("matmul_matrix", f"dropout, {MATRIX_TILES[-1].name}",
          partial(check_matmul, kind=Q4_K, columns=256, tile=MATRIX_TILES[-1], dropped=0.25)),
    Check("matmul_matrix", f"rows that are scaled, {MATRIX_TILES[-1].name}",
          partial(check_matmul, kind=Q4_K, columns=256, tile=MATRIX_TILES[-1], copied=True)),
    Check("row_bounds", f"{OUT_FEATURES}x256 Q4_0", partial(check_row_bounds, kind=Q4_0)),
    Check("halve_rows", f"{IN_USE}x264", check_halve_rows),
    Check("largest_of_rows", f"{ROWS}x64", check_largest_of_rows),
    Check("largest_weights", f"{OUT_FEATURES}x256 Q4_0", partial(check_largest_weights, kind=Q4_0)),
    *(
        Check("matmul_matrix", f"{tile.name} F16",
              partial(check_matmul, kind=F16, columns=100, tile=tile))
        for tile in (PAIRED_TILES[-1], PREPARED_TILES[-1])
    ),
    Check("pair_rows", f"{ROWS}x76", check_pair_rows),
    *(
        Check("pair_weights", f"{OUT_FEATURES}x256 Q4_0, by {'columns' if by_columns else 'rows'}",
              partial(check_pair_weights, kind=Q4_0, by_columns=by_columns))
        for by_columns in (False, True)
    ),
]  # fmt: skip
