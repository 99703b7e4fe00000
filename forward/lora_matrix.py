"""How the low-rank projections and gradients are cut for matrix units.

`tiles` of a cut are the vec4 that a kernel's tiles take of workgroup memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora.forward.matmul_matrix import EMULATED, shape_on, takes_units
from lora.shaders.recording import Recording
from lora.shaders.webgpu import MatrixShape

_SUBGROUPS = 8  # of a workgroup: they share a projection's contraction, a gradient's longer side
_PAD = 8  # f16 by which a tile's rows are longer, off each other's banks
# Rows of a workgroup of a projection: the first that makes enough workgroups and fits. Each reads
# all of the factor: 16 columns of f32 are as many bytes as 32 rows of f16.
_BLOCKS, _ENOUGH_GROUPS = (32, 16), 132
_LARGE_BLOCK, _MANY_GROUPS = 64, 256
_LARGE_DEPTH = 128  # which smaller fragments don't come to, whose devices have less memory, too
# B begins at zero and may stay below f16's normal numbers for long; one above 64 becomes infinite.
_SCALE_OF_B = 1024.0
# Rows of a gradient's tiles, in workgroup memory at a time. Each tile waits for memory once: of a
# long stretch of them larger ones pay, of f16 that a lane can hold until they come.
_GRADIENT_ROWS, _LONG_GRADIENT_ROWS, _LONG_STRETCH = 64, 128, 512


def _shape(recording: Recording) -> MatrixShape | None:
    """The fragments, where f16 training runs on matrix units."""
    if recording.precision != "f16" or not takes_units(recording, "low rank"):
        return None
    return shape_on(recording.facts) or EMULATED


def _of_shape(recording: Recording, shape: MatrixShape) -> dict[str, Any]:
    return {
        "emulated": shape_on(recording.facts) is None,
        "m": shape.m,
        "n": shape.n,
        "k": shape.k,
        "subgroup_lanes": shape.most_lanes,
    }


def _fits(recording: Recording, shape: MatrixShape, n_bytes: int) -> bool:
    facts = recording.facts
    lanes = _SUBGROUPS * shape.most_lanes
    whole = shape.m == shape.n and shape.n % 8 == 0 and shape.k % 8 == 0
    return whole and lanes <= facts.most_lanes and n_bytes <= facts.workgroup_memory


def projection_cut(
    recording: Recording, rows: int, columns: int, n_members: int, *, transposed: bool
) -> dict[str, Any] | None:
    """What lora_project_matrix.wgsl needs of its cut; None where it is left to plain kernels.

    A row's sums depend on none of it: a subgroup takes every eighth fragment of the contraction,
    however many lie in workgroup memory at a time. Where rows make too few workgroups for a GPU, or
    more columns don't fit, each is of fewer columns (`columns` of the cut); the few take longer
    stretches.

    Args:
        rows: recorded rows.
        columns: of each member.
        n_members: workgroups of their own.
        transposed: whether the factor is B, whose columns a workgroup takes whole.
    """
    shape = _shape(recording)
    if shape is None:
        return None
    narrow = shape.n if columns % shape.n == 0 and not transposed else columns
    for block, piece, enough in (
        (_LARGE_BLOCK, columns, _MANY_GROUPS),
        (_BLOCKS[0], columns, _ENOUGH_GROUPS),
        (_BLOCKS[1], columns, _ENOUGH_GROUPS),
        (_BLOCKS[1], narrow, 0),
    ):
        n_groups = -(-rows // block) * n_members * (columns // piece)
        if n_groups < enough:
            continue
        width = -(-piece // shape.n) * shape.n
        # d_z shares its dispatch with gradients, of which two workgroups then fit a multiprocessor.
        depths = (4, 2, 1) if n_groups <= _ENOUGH_GROUPS and not transposed else (2, 1)
        for times in (1,) if block == _LARGE_BLOCK else depths:
            depth = times * _SUBGROUPS * shape.k
            if block == _LARGE_BLOCK and depth < _LARGE_DEPTH:
                continue
            line = 2 * (depth + _PAD)
            factor = 2 * depth * (width + _PAD) if transposed else width * line
            in_use = max(block * line + factor, 4 * _SUBGROUPS * block * width)
            if _fits(recording, shape, in_use):
                return {
                    **_of_shape(recording, shape),
                    "subgroups": _SUBGROUPS,
                    "depth": depth,
                    "block_rows": block,
                    "columns": piece,
                    "tiles": in_use // 16,
                    "factor_scale": _SCALE_OF_B if transposed else 1.0,
                }
    return None


def gradient_cut(
    recording: Recording, shorts: Sequence[int], stretch: int = 0
) -> dict[str, Any] | None:
    """What lora_gradient_matrix.wgsl needs of its cut; None where it is left to plain kernels.

    Args:
        shorts: the lengths of the gradients' shorter sides.
        stretch: recorded rows that a workgroup sums, where both longer sides are f16; else 0.
    """
    shape = _shape(recording)
    if shape is None:
        return None
    long = _SUBGROUPS * shape.n
    width = -(-max(shorts) // shape.n) * shape.n
    for depth in (_LONG_GRADIENT_ROWS, _GRADIENT_ROWS):
        tiles = 2 * depth * (long + _PAD + width + _PAD)
        in_use = max(tiles, 4 * _SUBGROUPS * shape.m * shape.n)
        worth = depth == _GRADIENT_ROWS or stretch >= _LONG_STRETCH
        if worth and _fits(recording, shape, in_use + 16):
            cut = {"long": long, "depth": depth, "tiles": in_use // 16}
            return {**_of_shape(recording, shape), **cut}
    return None
