"""The table of bodies: what can compute a product with frozen matrices, and which one does.

A body more is a file beside matmul_tiled.py and a row here. CONTRIBUTING.md goes through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lora.forward.matmul_decoded import fits_decoded, record_decoded
from lora.forward.matmul_matrix import fits_matrix, record_matrix
from lora.forward.matmul_paired import fits_paired, record_paired
from lora.forward.matmul_prepared import fits_prepared, record_prepared
from lora.forward.matmul_tiled import record_tiled
from lora.forward.matmul_wide import record_wide
from lora.forward.part_product import PartProduct
from lora.forward.plans.matmul_plans import Request, plan_of
from lora.forward.plans.matmul_tiles import (
    DECODED_TILES,
    PAIRED_TILES,
    PREPARED_TILES,
    Plan,
    Tile,
    matrix_tiles_of,
    tiles_of,
)
from lora.forward.plans.stretches import Follower
from lora.shaders.activations import check_f32, check_shape, extent_of
from lora.shaders.facts import DeviceFacts
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor


@dataclass(frozen=True)
class Body:
    """One way to compute a product.

    Attributes:
        fits: (recording, product) → whether it can compute that there.
        plans: (facts, half) → the tiles among which a plan chooses, those of f16 where half; each
            names its body. Empty where there is nothing to choose.
        record: (program, request, plan) appends it; the plan is None without tiles.
    """

    fits: Callable[[Recording, PartProduct], bool]
    plans: Callable[[DeviceFacts, bool], tuple[Tile, ...]]
    record: Callable[[Program, Request, Plan | None], None]


def _tiles(facts: DeviceFacts, half: bool) -> tuple[Tile, ...]:
    return tiles_of(half, facts.workgroup_memory)


def _matrix_tiles(facts: DeviceFacts, half: bool) -> tuple[Tile, ...]:
    return matrix_tiles_of(facts.workgroup_memory) if half else ()


def _decoded_tiles(facts: DeviceFacts, half: bool) -> tuple[Tile, ...]:
    room = facts.workgroup_memory
    return tuple(t for t in DECODED_TILES if t.workgroup_bytes <= room) if half else ()


def _paired_tiles(facts: DeviceFacts, half: bool) -> tuple[Tile, ...]:
    room = facts.workgroup_memory
    return () if half else tuple(t for t in PAIRED_TILES if t.workgroup_bytes <= room)


def _prepared_tiles(facts: DeviceFacts, half: bool) -> tuple[Tile, ...]:
    room = facts.workgroup_memory
    return () if half else tuple(t for t in PREPARED_TILES if t.workgroup_bytes <= room)


def _for_units(one: PartProduct) -> bool:
    """Whether a product is recorded so for matrix units alone."""
    return bool(one.x_block) or one.dropout is not None or one.copied


def _fits_wide(recording: Recording, one: PartProduct) -> bool:
    return recording.facts.is_cpu and not _for_units(one)


def _fits_tiled(recording: Recording, one: PartProduct) -> bool:
    return not recording.facts.is_cpu and not _for_units(one)


# Of those that fit the first computes; where it has tiles, plans choose among those of all.
BODIES: Mapping[str, Body] = {
    "wide": Body(_fits_wide, lambda *_: (), record_wide),
    "matrix": Body(fits_matrix, _matrix_tiles, record_matrix),
    "decoded": Body(fits_decoded, _decoded_tiles, record_decoded),
    "paired": Body(fits_paired, _paired_tiles, record_paired),
    "prepared": Body(fits_prepared, _prepared_tiles, record_prepared),
    "tiled": Body(_fits_tiled, _tiles, record_tiled),
}


def record_product(program: Program, one: PartProduct, then: Follower | None, label: str) -> None:
    """Appends a product with one part, by the body that the recording names or those that fit.

    Args:
        then: see `lora.forward.matmul.matmul`; after a matrix of one part.
    """
    recording, extent = program.recording, extent_of(one.x)
    constants = one.constants(label)
    tensors = [extent.uniform, one.x, one.part.words, one.out]
    if one.members:
        if one.low is None or one.factor is None:
            raise ValueError(f"{label}: an adapted matrix needs z and its factors")
        tensors += [one.low, one.factor]
    tensors += [tensor for tensor in (one.x_largest, one.part.powers) if tensor is not None]
    check_f32(label, low=one.low, factor=one.factor, residual=one.residual, bias=one.bias)
    if one.residual is not None:
        check_shape(f"{label} residual", one.residual, *one.out.shape)
    half = recording.half_products
    names = [name for name, body in BODIES.items() if body.fits(recording, one)]
    if recording.body is not None:
        names = [recording.body]
    if one.x_block and not {"matrix", "decoded"} & {*names}:
        raise ValueError(f"{label}: {names} take no x in blocks")
    if one.dropout is not None and not {"matrix", "decoded"} & {*names}:
        raise ValueError(f"{label}: {names} take no dropout")
    if one.copied and not {"matrix", "decoded"} & {*names}:
        raise ValueError(f"{label}: {names} take no rows of f16 that are scaled")
    terms = one.contraction + len(one.members) * one.rank
    request = Request(
        record=record_request,
        body=names[0],
        tiles=_tiles_of(names, recording.facts, half),
        half=half,
        extent=extent,
        out=one.out,
        constants=constants,
        tensors=tensors,
        after=_after(one),
        place=one.place,
        label=label,
        flops=2 * extent.maximum * one.n_columns * terms,
        then=then,
        largest=one.part.largest,
        dropout=one.dropout if one.members else None,
    )
    record_request(program, request)


def _after(one: PartProduct) -> list[Tensor]:
    """What the last pass takes, in the order of its bindings."""
    scaled = [] if one.scaled is None else [one.scaled.scales, one.scaled.kept]
    return [*(tensor for tensor in (one.residual, one.bias) if tensor is not None), *scaled]


def _tiles_of(names: Sequence[str], facts: DeviceFacts, half: bool) -> tuple[Tile, ...]:
    of_bodies = [BODIES[name].plans(facts, half) for name in names]
    return tuple(tile for tiles in of_bodies for tile in tiles) if of_bodies[0] else ()


def record_request(program: Program, request: Request) -> None:
    """Appends a product by the body of its plan."""
    if not request.tiles:
        BODIES[request.body].record(program, request, None)
        return
    plan = plan_of(program.recording, request)
    BODIES[plan.tile.body].record(program, request, plan)
