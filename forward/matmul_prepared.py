"""Products in f32 on matrix units whose pairs of f16 are made first, once for all tiles.

matmul_paired.py makes pairs on the way into every tile, and so does every other tile of the same
rows or columns: about half an instruction for each multiply-add, where units take a fraction of
one. Here x and W are in scratch memory as pairs, and tiles load what they hold. The pairs are the
same numbers, and so is the result, to the last bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from lora.forward.matmul_matrix import fragments_on, in_one_load
from lora.forward.matmul_paired import check_pairs, fits_paired, paired_constants
from lora.forward.matmul_passes import record_passes
from lora.forward.model.weights import MOST_DECODED, PAIR_BYTES
from lora.forward.pairs import pair_rows, pair_weights
from lora.forward.part_product import PartProduct
from lora.forward.plans.matmul_plans import Request
from lora.forward.plans.matmul_tiles import Plan
from lora.shaders.memory import ALIGNMENT
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

_LEAST_ROWS = 256  # fewer don't make up for a pass over the matrix
_DEEPEST = 32  # steps of a tile, to which contractions are padded at most


class _Sizes(NamedTuple):
    """Of the pairs: rows and padded columns of x, and of W, which has none where f16 holds it."""

    x: tuple[int, int]
    w: tuple[int, int]

    @property
    def x_bytes(self) -> int:
        return PAIR_BYTES * self.x[0] * self.x[1]

    @property
    def w_bytes(self) -> int:
        return PAIR_BYTES * self.w[0] * self.w[1]


def _sizes(rows: int, n_columns: int, contraction: int, transposed: bool, depth: int) -> _Sizes:
    steps = -(-contraction // depth) * depth
    w = (steps, -(-n_columns // 8) * 8) if transposed else (n_columns, steps)
    return _Sizes((rows, steps), w)


def fits_prepared(recording: Recording, one: PartProduct) -> bool:
    """Where pairs are multiplied, of many rows that are of bounded size, as the weights are."""
    if not fits_paired(recording, one) or one.x.shape[0] < _LEAST_ROWS:
        return False
    shape = (one.x.shape[0], one.n_columns, one.contraction)
    sizes = _sizes(*shape, one.transposed, _DEEPEST)
    w_bytes = 0 if one.part.quantization.name == "f16" else sizes.w_bytes
    room = recording.facts.max_binding - 2 * ALIGNMENT
    return max(sizes.x_bytes, w_bytes) <= MOST_DECODED and sizes.x_bytes + w_bytes <= room


def record_prepared(program: Program, request: Request, plan: Plan | None) -> None:
    """Appends the pairs of x and of W, the product with them, and the norm after it."""
    assert plan is not None  # tiles are chosen
    check_pairs(request)
    c, rows, depth = request.constants, request.extent.maximum, plan.tile.depth
    sizes = _sizes(rows, c["n_columns"], c["contraction"], c["transposed"], depth)
    memory = program.recording.memory
    largest = memory.row_scratch(rows)
    tensors, scales = list(request.tensors), [largest]
    exact = request.largest is None
    if exact:
        (x_pairs,) = _in_scratch(program, sizes.x)
    else:
        w_pairs, x_pairs = _in_scratch(program, sizes.w, sizes.x)
    pair_rows(
        program, tensors[1], c["contraction"], request.place,
        largest=largest, out=x_pairs, label=request.label,
    )  # fmt: skip
    tensors[1] = x_pairs
    constants = {**c, "x_stride": sizes.x[1]}
    more = {
        **in_one_load(request, depth),
        **fragments_on(program.recording.facts),
        **paired_constants(request),
        "prepared": True,
        "x_by_eights": True,
        "w_paired_rows": 0 if exact else sizes.w[0],
    }
    if request.largest is not None:
        pair_weights(
            program, tensors[2], c["quantization"], request.largest,
            by_columns=c["transposed"], out=w_pairs, label=request.label,
        )  # fmt: skip
        tensors[2] = w_pairs
        scales.append(request.largest)
        constants["row_words"] = sizes.w[1] // 2
        more["w_by_eights"] = True
    own = replace(request, constants=constants, tensors=[*tensors, *scales])
    record_passes(program, own, plan, "matmul_matrix", more, in_scratch=True)


def _in_scratch(program: Program, *sizes: tuple[int, int]) -> list[Tensor]:
    """Scratch memory for some pairs at once, each u32 [2, rows, columns / 2]."""
    aligned = ALIGNMENT // 4
    words = [-(-rows * columns // aligned) * aligned for rows, columns in sizes]
    whole = replace(program.recording.memory.scratch((sum(words),)), dtype="u32")
    return [
        replace(
            whole,
            offset=whole.offset + 4 * sum(words[:index]),
            shape=(2, rows, columns // 2),
        )
        for index, (rows, columns) in enumerate(sizes)
    ]
