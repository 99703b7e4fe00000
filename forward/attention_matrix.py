"""How attention is cut for matrix units: fragments of scores and sums, by the lanes of a subgroup.

Scores pass workgroup memory, since fragments give no access to their numbers. Where a device lists
no such units, the same tiling and indexing run in plain WGSL, for tests.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lora.forward.matmul_matrix import EMULATED, shape_on, takes_units
from lora.shaders.facts import DeviceFacts
from lora.shaders.recording import Recording
from lora.shaders.webgpu import MatrixShape

# Products of a step of the walk, and sums that are kept: scores; d_p beside them; d_k and d_v.
ROUNDS = {
    "attention": (1, 1),
    "attention_backward_q": (2, 1),
    "attention_backward_kv": (2, 2),
}


@dataclass(frozen=True)
class MatrixCut:
    """How an attention kernel on matrix units cuts its work: constants of attention_fragments.wgsl.

    Attributes:
        block: rows of a workgroup: queries, or keys. It decides speed alone.
        walk: rows that pass at a time; it decides the order of sums.
        job_rows, job_columns: of the block's scores that a subgroup computes.
        out_rows, out_columns: of its sums that a subgroup holds.
    """

    block: int
    walk: int
    job_rows: int
    job_columns: int
    out_rows: int
    out_columns: int

    def workgroups(self, rows: int, heads: int) -> int:
        """How many workgroups cover `heads` heads of that many rows."""
        return -(-rows // self.block) * heads

    def subgroups(self, kernel: str, head_size: int) -> int:
        """Of a workgroup."""
        products, outputs = ROUNDS[kernel]
        jobs = self.block // self.job_rows * (self.walk // self.job_columns)
        outs = self.block // self.out_rows * (head_size // self.out_columns)
        return max(products * jobs, outputs * outs)

    def memory(self, kernel: str, head_size: int, shape: MatrixShape) -> int:
        """Bytes of workgroup memory."""
        products, _ = ROUNDS[kernel]
        tiles = 2 * self.walk * (head_size // 8 + 1)
        scores = products * self.block * (self.walk // 4 + 1)
        total = max(tiles + scores, self._stage(kernel, head_size, shape))
        return 16 * total + 8 * self.block * (self.walk // shape.k)

    def _stage(self, kernel: str, head_size: int, shape: MatrixShape) -> int:
        return self.subgroups(kernel, head_size) * shape.m * shape.n // 4

    def fits(self, kernel: str, head_size: int, shape: MatrixShape, facts: DeviceFacts) -> bool:
        """Whether a device can run it, for heads of that size."""
        m, n, k = shape.m, shape.n, shape.k
        whole = (
            self.block % self.job_rows, self.walk % self.job_columns, self.block % self.out_rows,
            head_size % self.out_columns, self.job_rows % m, self.out_rows % m, self.walk % k,
            self.job_columns % n, self.out_columns % n, head_size % k, head_size % 16, k % 8, n % 8,
        )  # fmt: skip
        if any(whole):
            return False
        lanes = self.subgroups(kernel, head_size) * shape.most_lanes
        # Sums that are scaled on the way pass the tile of the keys.
        passes = kernel != "attention" or (
            self._stage(kernel, head_size, shape) <= self.walk * (head_size // 8 + 1)
        )
        return (
            passes
            and max(self.block, self.walk) <= lanes <= facts.most_lanes
            and self.memory(kernel, head_size, shape) <= facts.workgroup_memory
        )


def _of_whole_rows(head_size: int) -> tuple[MatrixCut, ...]:
    """For heads that no row of the table is for: a subgroup holds whole rows of sums."""
    return tuple(MatrixCut(block, 32, 16, 32, 16, head_size) for block in (64, 32, 16))


# By kernel and head size, the largest block first; found by benchmarks/attention_matrix.py on an
# H200. The cuts of a row have one `walk`, or results would depend on the number of rows.
CUTS = {
    ("attention", 64): (
        MatrixCut(64, 32, 16, 32, 32, 32),
        MatrixCut(32, 32, 16, 16, 16, 32),
        MatrixCut(16, 32, 16, 16, 16, 32),
    ),
    ("attention", 128): (
        MatrixCut(128, 32, 32, 16, 32, 64),
        MatrixCut(64, 32, 32, 16, 32, 64),
        MatrixCut(32, 32, 16, 16, 32, 32),
        MatrixCut(16, 32, 16, 16, 16, 64),
    ),
    ("attention", 256): (
        MatrixCut(64, 32, 16, 16, 32, 64),
        MatrixCut(32, 32, 16, 16, 32, 64),
        MatrixCut(16, 32, 16, 16, 16, 64),
    ),
    ("attention_backward_q", 64): (
        MatrixCut(128, 32, 32, 32, 32, 32),
        MatrixCut(32, 32, 16, 32, 16, 32),
        MatrixCut(16, 32, 16, 16, 16, 16),
    ),
    ("attention_backward_q", 128): (
        MatrixCut(64, 32, 32, 32, 32, 64),
        MatrixCut(32, 32, 16, 32, 32, 32),
        MatrixCut(16, 32, 16, 32, 16, 64),
    ),
    ("attention_backward_q", 256): (
        MatrixCut(32, 32, 16, 16, 32, 32),
        MatrixCut(16, 32, 16, 16, 16, 64),
    ),
    ("attention_backward_kv", 64): (
        MatrixCut(128, 32, 32, 32, 32, 64),
        MatrixCut(32, 32, 16, 32, 32, 32),
        MatrixCut(16, 32, 16, 32, 16, 64),
    ),
    ("attention_backward_kv", 128): (
        MatrixCut(64, 32, 32, 16, 32, 64),
        MatrixCut(32, 32, 32, 16, 32, 64),
        MatrixCut(16, 32, 16, 32, 16, 128),
    ),
    ("attention_backward_kv", 256): (
        MatrixCut(32, 32, 16, 16, 32, 64),
        MatrixCut(16, 32, 16, 16, 16, 128),
    ),
}


def cuts_of(kernel: str, head_size: int) -> tuple[MatrixCut, ...]:
    """Those that are thought of for a head, the largest block first."""
    return CUTS.get((kernel, head_size)) or _of_whole_rows(head_size)


MOST_HEAD_SIZE = 256  # two tiles of larger heads are too much for workgroup memory
# Narrower blocks are chosen until a dispatch has this many for each 64 rows of its blocks.
WORKGROUPS_WANTED = 128
MOST_GROWTH = 5.0  # by which a score may pass the maximum that weights refer to: e^5 is 148


def choose_cut(
    kernel: str, recording: Recording, rows: int, heads: int, head_size: int
) -> MatrixCut | None:
    """The cut of a kernel where attention runs on matrix units; None where it does not.

    It does where `takes_units` says so. The number of rows decides the block alone: results would
    depend on anything else.

    Args:
        kernel: "attention", "attention_backward_q" or "attention_backward_kv".
        recording: what it is recorded with.
        rows: recorded rows; fewer than the narrowest block are left to the plain kernels.
        heads: heads that have workgroups of their own.
        head_size: columns of a head.
    """
    facts = recording.facts
    if not takes_units(recording, "attention") or head_size > MOST_HEAD_SIZE:
        return None
    shape = shape_on(facts) or EMULATED
    fitting = [
        cut
        for cut in cuts_of(kernel, head_size)
        if cut.block <= rows and cut.fits(kernel, head_size, shape, facts)
    ]
    wanted = {cut: WORKGROUPS_WANTED * max(1, cut.block // 64) for cut in fitting}
    many = [cut for cut in fitting if cut.workgroups(rows, heads) >= wanted[cut]]
    return next(iter(many or fitting[-1:]), None)


def cut_constants(recording: Recording, cut: MatrixCut, rows: int) -> dict[str, Any]:
    """What the templates need of it, on a device."""
    shape = shape_on(recording.facts)
    of = shape or EMULATED
    return {
        **asdict(cut),
        "emulated": shape is None,
        "m": of.m,
        "n": of.n,
        "k": of.k,
        "subgroup_lanes": of.most_lanes,
        "maximum_rows": rows,
    }
