"""One row as whole numbers of three bytes: what products of one row with quantized matrices take.

A GPU multiplies four bytes by four bytes and adds them up in one instruction. A row of text
generation is therefore kept, beside its f32, as blocks of 32 whole numbers below 2^22 with a scale
each: as exact as f32 for a sum in which the block's largest number takes part, and products with
quantized weights need no decoding to floats. llama.cpp keeps one byte a number for this (Q8_1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lora.forward.model.norm import Norm
from lora.forward.model.weights import FrozenMatrix
from lora.forward.rmsnorm import row_lanes
from lora.shaders.activations import check_shape
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor

BLOCK = 32  # columns that share a scale
_BLOCK_WORDS = 28  # three digits of 32 numbers, a scale, two sums, a sum of squares
_LANES = 64  # of a workgroup of `to_int_row` without a norm


@dataclass(frozen=True)
class IntRow:
    """A row v = y ∘ weight, or y itself, as whole numbers.

    Attributes:
        words: u32 [width / 32 · 28]; see shaders/wgsl/parts/int_row_store.wgsl.
        width: columns of the row, a multiple of 32.
        norm: the RMSNorm that the row is on its way into, whose weight is in v; None for v = y. The
            product that takes the row divides by the root mean square of y.
    """

    words: Tensor
    width: int
    norm: Norm | None = None

    @classmethod
    def allocate(cls, recording: Recording, width: int, extent: Extent) -> IntRow:
        """Memory for a row."""
        if width % BLOCK:
            raise ValueError(f"a row of {width} columns is no whole number of blocks of {BLOCK}")
        return cls(
            recording.memory.empty((1, width // BLOCK * _BLOCK_WORDS), "u32", extent=extent), width
        )

    def before_norm(self, norm: Norm | None) -> IntRow:
        """The same memory, for a row on its way into an RMSNorm."""
        if norm is not None:
            check_shape("int row's norm", norm.weight, self.width)
        return replace(self, norm=norm)


def takes_int_row(recording: Recording, matrix: FrozenMatrix) -> bool:
    """Whether products of one row with a matrix are to be computed by `matmul_int_row`.

    A CPU device gains nothing; Metal has no instruction for products of bytes.
    """
    return (
        not recording.facts.is_cpu
        and recording.facts.info.get("backend_type") != "Metal"
        and matrix.in_features % BLOCK == 0
        and all(part.quantization.numbers is not None for part in matrix.parts)
    )


@dataclass(frozen=True)
class RowNorm:
    """An RMSNorm of a row: y = norm(x) ∘ weight + residual.

    Attributes:
        norm: of that width.
        out: [1, width], where y is written.
        residual: [1, width], added; None for none.
    """

    norm: Norm
    out: Tensor
    residual: Tensor | None = None


def to_int_row(
    program: Program, x: Tensor, to: IntRow, *, norm: RowNorm | None = None, label: str = "int_row"
) -> IntRow:
    """Appends a row's form as whole numbers.

    Args:
        x: [1, width].
        to: what to write; the weight of its norm is multiplied in.
        norm: what x passes first; None for nothing.
        label: what the dispatch is called in listings.
    """
    check_shape("int row", x, 1, to.width)
    if x.dtype != "f32":
        raise ValueError(f"{label}: a row of {x.dtype} cannot become whole numbers")
    lanes = _LANES
    tensors = [x, to.words]
    if norm is not None:
        lanes = max(8, row_lanes(program.recording, to.width))
        check_shape("int row's norm", norm.norm.weight, to.width)
        check_shape("int row's output", norm.out, 1, to.width)
        tensors += [norm.norm.weight, norm.out]
        if norm.residual is not None:
            check_shape("int row's residual", norm.residual, 1, to.width)
            tensors.append(norm.residual)
    if to.norm is not None:
        tensors.append(to.norm.weight)
    constants: dict[str, Any] = {
        "width": to.width,
        "lanes": lanes,
        "norm": norm is not None,
        "epsilon": norm.norm.epsilon if norm else None,
        "residual": norm is not None and norm.residual is not None,
        "next_norm": to.norm is not None,
    }
    workgroups = 1 if norm is not None else -(-to.width // (4 * lanes))
    program.dispatch("int_row", constants, tensors, workgroups, label=label)
    return to
