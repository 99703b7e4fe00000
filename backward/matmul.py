"""Gradients of products with frozen matrices: to the input only, since the weights never change."""

from __future__ import annotations

from dataclasses import dataclass

from lora.forward.dropout import GroupDropout
from lora.forward.matmul_bodies import record_product
from lora.forward.matmul_matrix import takes_blocks
from lora.forward.model.factors import LoraFactors
from lora.forward.model.weights import FrozenMatrix
from lora.forward.part_product import InBlocks, PartProduct, Place, SizedRows
from lora.forward.plans.stretches import Follower
from lora.shaders.activations import activation, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


@dataclass(frozen=True)
class Accumulate:
    """Where x was a stream that others read too: d_x is added to what `out` holds."""


@dataclass(frozen=True)
class Dropped:
    """d_z where dropout was before A: of each member's share of d_x counts what its mask leaves."""

    d_z: Tensor
    dropout: GroupDropout


def matmul_backward(
    program: Program,
    d_y: Tensor | SizedRows | InBlocks,
    matrix: FrozenMatrix,
    *,
    lora: LoraFactors | None = None,
    d_z: Tensor | Dropped | None = None,
    out: Tensor | None = None,
    before: Follower | Accumulate | None = None,
    label: str = "matmul_backward",
) -> Tensor:  # [rows, in_features]
    """Appends d_x = d_y · W + d_z · A, decoding W inside the kernel's tiles.

    Args:
        d_y: [rows, out_features]; with their sizes rows of f32 are scaled for tiles of f16, which
            read a copy of f16 in their place where there is one; in blocks where `takes_blocks`
            says so.
        matrix: W [out_features, in_features].
        lora: the factors of the adapted members of W, or None.
        d_z: [rows, members · rank], the gradient to z = x · Aᵀ, needed with `lora`; with the
            dropout of x before each member's A where `takes_dropout` says so.
        out: where to write; a new tensor by default.
        before: what gave x: its backward is appended too, and d_x may then stay unwritten; to
            `Accumulate` d_x is added.
    """
    then = None if isinstance(before, Accumulate) else before
    block, largest, dropout = 0, None, None
    if isinstance(d_z, Dropped):
        dropout, d_z = d_z.dropout, d_z.d_z
    if isinstance(d_y, SizedRows):
        largest, d_y = d_y.largest, d_y.of_units
    elif isinstance(d_y, InBlocks):
        block, d_y = d_y.block, d_y.tensor
        if not takes_blocks(program.recording, matrix, block) or d_y.dtype != "f16":
            raise ValueError(f"{label}: {matrix.out_features} columns of {d_y.dtype} in blocks")
    extent = extent_of(d_y)
    columns = matrix.out_features * (2 if block else 1)
    check_shape("matmul_backward input", d_y, None, columns)
    d_x = out if out is not None else activation(program, extent, matrix.in_features)
    check_shape("matmul_backward output", d_x, d_y.shape[0], matrix.in_features)
    n_members = lora.n_members if lora else 0
    low_rank = tuple({"low_start": i * lora.rank} for i in range(n_members)) if lora else ()
    whole = len(matrix.parts) == 1
    for index, part in enumerate(matrix.parts):
        one = PartProduct(
            d_y,
            part,
            d_x,
            transposed=True,
            contraction=part.out_features,
            place=None if whole else Place(part.first_feature * (2 if block else 1), 0),
            members=low_rank if index == 0 else (),
            low=d_z,
            factor=lora.a if lora else None,
            rank=lora.rank if lora else 0,
            epilogue="accumulate" if index or isinstance(before, Accumulate) else "write",
            x_largest=largest,
            x_block=block,
            dropout=dropout if index == 0 and low_rank else None,
        )
        record_product(program, one, then if whole else None, label)
    if then is not None and not whole:
        then.record(program, d_x)
    return d_x
