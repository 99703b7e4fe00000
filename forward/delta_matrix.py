"""The gated delta rule's kernels cut for matrix units: forward's and backward's, all or none.

Where a device lists no such units, the same tiling and indexing run in plain WGSL, for tests.
"""

from __future__ import annotations

from typing import Any

from lora.forward.matmul_matrix import fragments_on, takes_units
from lora.shaders.recording import Recording

CHUNK = 64
_SUBGROUPS = 8  # of a workgroup
_MIX_SCALE = 64.0  # of T and P in f16: neither passes 1 where keys and queries have length 1
_GATES = 6 * 4 * CHUNK + 1280  # bytes: gates of a chunk, and what sums over rows pass


def delta_cut(recording: Recording, chunk: int, head_size: int) -> dict[str, Any] | None:
    """What the templates need of the cut; None where the rule is left to the plain kernels.

    Units take it in f16, where `takes_units` says so; rows and examples decide nothing.

    Args:
        chunk: rows of a chunk on the device.
        head_size: columns of a head.
    """
    if (
        recording.precision != "f16"
        or not takes_units(recording, "gated delta rule")
        or chunk != CHUNK
    ):
        return None
    fragments = fragments_on(recording.facts)
    m, n, k = (fragments[name] for name in "mnk")
    if m != n or n % 8 or k % 8 or 2 * CHUNK % (m * _SUBGROUPS) or CHUNK % k:
        return None
    if head_size % 16 or head_size % n or head_size % k:
        return None
    lanes = _SUBGROUPS * fragments["subgroup_lanes"]
    facts = recording.facts
    if lanes % CHUNK or CHUNK * CHUNK // 4 % lanes or lanes > facts.most_lanes:
        return None
    if workgroup_bytes(head_size, n, k) > facts.workgroup_memory:
        return None
    return {
        **fragments, "subgroups": _SUBGROUPS, "lanes": lanes, "columns": n,
        "slice": next(width for width in (64, 32, 16) if head_size % width == 0),
        "state_rows": next(
            rows for rows in range(m, head_size + 1, m)
            if head_size % rows == 0 and head_size // rows <= _SUBGROUPS
        ),
        "mix_scale": _MIX_SCALE,
    }  # fmt: skip


def workgroup_bytes(head_size: int, n: int, k: int) -> int:
    """Of the largest of the kernels, whose templates lay tiles out, for `n` columns of v."""
    row, square = CHUNK * (head_size // 8 + 1), CHUNK * (CHUNK // 8 + 1)
    depth = head_size // 2 if head_size // 2 % k == 0 else head_size
    walked = max(2 * CHUNK * (depth // 8 + 1), square + row, 2 * CHUNK * n // 4)
    states = head_size * n // 4 + (max(head_size, CHUNK) + CHUNK) * (n // 8 + 1)
    wide = CHUNK * (CHUNK // 4 + 1)  # f32
    alone = max(row + max(row, wide), wide + square, 2 * square + CHUNK * 10)
    return 16 * max(walked + states, alone) + _GATES
