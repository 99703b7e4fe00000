"""The body of products for matrix units: fragments of tiles, multiplied by a subgroup together.

WGSL's subgroup matrices (chromium_experimental_subgroup_matrix). Where a device lists none, the
same tiling and indexing run in plain WGSL, for tests.
"""

from __future__ import annotations

from typing import Any

from lora.forward.matmul_passes import record_passes
from lora.forward.model.weights import FrozenMatrix
from lora.forward.part_product import PartProduct
from lora.forward.plans.matmul_plans import Request
from lora.forward.plans.matmul_tiles import Plan
from lora.shaders.facts import DeviceFacts
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.webgpu import MatrixShape

_DEEPEST = 64  # steps of the contraction that a tile has
# What plain WGSL does instead of an NVIDIA GPU's matrix units.
EMULATED = MatrixShape(16, 16, 16, "f16", "f32", 32, 32)


def shape_on(facts: DeviceFacts) -> MatrixShape | None:
    """The shape of fragments that the body takes on a device; None where there is none."""
    return facts.matrix_shape


def has_matrix_units(facts: DeviceFacts) -> bool:
    """Whether a device computes faster with them."""
    return facts.has_matrix_units


def takes_units(recording: Recording, kind: str = "products") -> bool:
    """Whether what is beside products takes them as well, where it is in f16.

    On GPUs that have them, unless the recording names another body of products; `body="matrix"`
    takes them on software drivers, too, and plain WGSL in their place where there are none.

    Args:
        kind: of kernels, of which a device may be found to compute some alone wrongly.
    """
    if kind in recording.facts.distrusted:
        return False
    if recording.body is None or recording.body == "decoded":
        return has_matrix_units(recording.facts)
    return recording.body == "matrix"


def takes_blocks(recording: Recording, matrix: FrozenMatrix, block: int) -> bool:
    """Whether the gradient to a product may be `InBlocks`, of which no tile reaches past a block.

    Args:
        matrix: of the product.
        block: columns of a block.
    """
    whole = all(
        part.first_feature % block == 0 and part.out_features % _DEEPEST == 0
        for part in matrix.parts
    )
    fits = block >= _DEEPEST and block & (block - 1) == 0
    return whole and fits and recording.half_products and takes_units(recording)


def takes_dropout(recording: Recording) -> bool:
    """Whether the gradient to what dropout was given can be the product's own (`PartProduct`)."""
    return recording.half_products and takes_units(recording)


def takes_copies(recording: Recording) -> bool:
    """Whether kernels of training read rows of f32 as `SizedRows.halves`, where there are any."""
    return recording.precision == "f16" and recording.half_products and takes_units(recording)


def fits_matrix(recording: Recording, _: PartProduct) -> bool:
    """Where products are in f16 on a GPU that has such units: factors are f16 there, sums f32."""
    return recording.half_products and has_matrix_units(recording.facts)


def record_matrix(
    program: Program, request: Request, plan: Plan | None, *, decoded: bool = False
) -> None:
    """Appends the product, and what follows it.

    Args:
        decoded: whether the weights have been multiplied by the powers of their rows.
    """
    assert plan is not None  # tiles are chosen
    constants = {
        **in_one_load(request, plan.tile.depth, as_stored=decoded),
        **fragments_on(program.recording.facts),
        "paired": False,
        "prepared": False,
        "w_exact": False,
        "w_powered": request.constants["powered"] and not decoded,
    }
    record_passes(program, request, plan, "matmul_matrix", constants, in_scratch=decoded)


def fragments_on(facts: DeviceFacts) -> dict[str, Any]:
    """What the template must know of a device's units."""
    shape = shape_on(facts)
    of = shape or EMULATED
    return {
        "emulated": shape is None,
        "m": of.m,
        "n": of.n,
        "k": of.k,
        "subgroup_lanes": of.most_lanes,
    }


def in_one_load(request: Request, depth: int, *, as_stored: bool = False) -> dict[str, bool]:
    """Whether eight numbers of either side, as f16, are one element of an array of vec4<u32>.

    Args:
        as_stored: no weight is multiplied on the way, though the product has powers.
    """
    c, place = request.constants, request.place
    aligned = (c["contraction"] % depth, c["x_stride"] % 8, place.x_column % 8 if place else 0)
    return {
        "x_by_eights": c["x_type"] == "f16" and not any(aligned),
        "w_by_eights": c["quantization"] == "f16"
        and c["row_words"] % 4 == 0
        and (as_stored or not c["powered"]),
    }
