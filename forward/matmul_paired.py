"""Products in f32 on matrix units, each number a pair of f16: the kernel of matmul_matrix.py.

Ootomo and Yokota 2022, "Recovering single precision accuracy from Tensor Cores while surpassing the
FP32 theoretical peak performance". parts/pairs.wgsl says how numbers are split. Tiles make the
pairs on the way in; of many rows they may be made beforehand (matmul_prepared.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lora.forward.matmul_matrix import EMULATED, fragments_on, in_one_load, shape_on
from lora.forward.matmul_passes import record_passes
from lora.forward.part_product import PartProduct, Place, place_uniforms
from lora.forward.plans.matmul_plans import Request
from lora.forward.plans.matmul_tiles import Plan
from lora.shaders.activations import extent_of
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

# Steps of the contraction after which the sums of the units are added to others: units truncate,
# which would make errors over a long contraction several times those of plain sums
# (tests/forward/test_matmul_paired.py has the arithmetic). Pairs have three products in one sum.
# Plain sums of few terms err less, so that of these the units' are carried more often; everywhere
# it would cost a product of 4096³ a sixth of its rate on an H200 (docs/log.md).
CARRY, _CARRY_OF_FEW = 256, 128
_FEW_TERMS = 4096  # fewer than these
_OF_F16 = ("tiled", "matrix", "decoded")  # bodies whose tiles are of f16, under f16


def fits_paired(recording: Recording, one: PartProduct) -> bool:
    """Where f32 is multiplied on a GPU with such units, with weights whose sizes are known."""
    known = one.part.largest is not None or one.part.quantization.name == "f16"
    shape = shape_on(recording.facts) or EMULATED
    one_column = shape.most_lanes % shape.n == 0  # of a lane's numbers in a fragment
    return recording.paired_products and known and one_column and one.x.dtype == "f32"


def scales_rows(recording: Recording, dtype: str, n_others: int) -> bool:
    """Whether products of such rows ask for their sizes: f32, where tiles are of f16.

    Not where products don't ask: rows of f16 have their range already, CPU devices compute in
    f32, and the kernel might bind no more.

    Args:
        dtype: of the rows.
        n_others: storage buffers that the product binds beside them.
    """
    plain = recording.facts.is_cpu if recording.body is None else recording.body not in _OF_F16
    room = recording.facts.most_storage_buffers > n_others
    return recording.half_products and dtype == "f32" and not plain and room


def row_scales(program: Program, x: Tensor, n_others: int, label: str) -> Tensor | None:
    """Appends what finds powers of two for rows of f32 that go into tiles of f16.

    Nothing where none are asked for (`scales_rows`).

    Args:
        x: [rows, columns], an activation.
        n_others: storage buffers that the product binds beside them.
    """
    recording = program.recording
    if not scales_rows(recording, x.dtype, n_others):
        return None
    out = recording.memory.row_scratch(x.shape[0])
    largest_of_rows(program, x, x.shape[1], None, out=out, label=label)
    return out


def largest_of_rows(
    program: Program, x: Tensor, columns: int, place: Place | None, *, out: Tensor, label: str
) -> None:
    """Appends out[m] = the bits of max |x[m, k]| over so many columns.

    Args:
        x: f32 [rows, …], an activation.
        place: where the columns begin; None for the first.
        out: u32 [rows].
    """
    constants = {"x_stride": x.shape[1], "columns": columns, "placed": place is not None}
    extent = extent_of(x)
    program.dispatch(
        "largest_of_rows",
        constants,
        [extent.uniform, x, out, *place_uniforms(program, place)],
        extent.maximum,
        label=f"{label}.largest",
    )


def record_paired(program: Program, request: Request, plan: Plan | None) -> None:
    """Appends the sizes of x's rows, the product, and the norm after it."""
    assert plan is not None  # tiles are chosen
    check_pairs(request)
    c, x = request.constants, request.tensors[1]
    largest = program.recording.memory.row_scratch(request.extent.maximum)
    largest_of_rows(program, x, c["contraction"], request.place, out=largest, label=request.label)
    scales = [largest] if request.largest is None else [largest, request.largest]
    more = {
        **in_one_load(request, plan.tile.depth),
        **fragments_on(program.recording.facts),
        **paired_constants(request),
        "prepared": False,
    }
    scaled = replace(request, tensors=[*request.tensors, *scales])
    record_passes(program, scaled, plan, "matmul_matrix", more)


def carry_of(contraction: int) -> int:
    """Steps after which sums over so many are added to others: a multiple of every tile's depth."""
    return CARRY if contraction >= _FEW_TERMS else _CARRY_OF_FEW


def check_pairs(request: Request) -> None:
    """Raises ValueError for what is no product of pairs."""
    c = request.constants
    known = request.largest is not None or c["quantization"] == "f16"
    if c["x_type"] != "f32" or not known or c["powered"]:
        raise ValueError(f"{request.label}: pairs are of f32, and of weights whose sizes are known")


def paired_constants(request: Request) -> dict[str, Any]:
    """What the template must know of pairs; weights without sizes are of f16, which holds them."""
    return {
        "paired": True,
        "w_exact": request.largest is None,
        "w_powered": False,
        "carry": carry_of(request.constants["contraction"]),
    }
