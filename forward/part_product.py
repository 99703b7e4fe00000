"""A product with one part of a matrix: what bodies record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora.forward.dropout import GroupDropout
from lora.forward.model.factors import LoraFactors
from lora.forward.model.weights import MatrixPart
from lora.forward.product import ScaledColumns
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


@dataclass(frozen=True)
class Place:
    """Where one part's columns begin in x and in out: parts of a matrix share their kernel so."""

    x_column: int
    out_column: int


@dataclass(frozen=True)
class InBlocks:
    """f16 in the place of f32: so many columns, as many that are stale, and so on.

    Attributes:
        tensor: f16 [rows, 2 · columns].
        block: columns of a block, a power of two.
    """

    tensor: Tensor
    block: int


def place_uniforms(program: Program, place: Place | None) -> list[Tensor]:
    """The uniform of a part's place, where it has one."""
    if place is None:
        return []
    return [program.recording.memory.constant_uniform((place.x_column, place.out_column))]


def adapted_members(lora: LoraFactors | None, part: MatrixPart) -> list[dict[str, int]]:
    """The adapted ranges inside a part: columns of the part, columns of z, rows of B."""
    members: list[dict[str, int]] = []
    if lora is None:
        return members
    for index, (start, stop) in enumerate(lora.ranges):
        first = max(start, part.first_feature)
        last = min(stop, part.first_feature + part.out_features)
        if first < last:
            members.append(
                {
                    "start": first - part.first_feature,
                    "stop": last - part.first_feature,
                    "low_start": index * lora.rank,
                    "factor_start": lora.first_feature(index) + first - start,
                }
            )
    return members


@dataclass(frozen=True)
class SizedRows:
    """Rows whose sizes are known.

    Attributes:
        rows: f32 [rows, columns].
        largest: u32 [rows], what `row_scales` finds; None where rows are taken as they are.
        halves: f16 [rows, columns], each row times the power of two that its size asks for, as
            tiles of f16 hold it; None where there is no such copy.
    """

    rows: Tensor
    largest: Tensor | None
    halves: Tensor | None = None

    @property
    def of_units(self) -> Tensor:
        """What kernels on matrix units read: the copy, where there is one."""
        return self.rows if self.halves is None else self.halves


@dataclass(frozen=True)
class PartProduct:
    """The product with one part: what `matmul` and its backward share.

    transposed=False: out[m, n] = Σ_k x[m, k] · W[n, k] + scale · Σ_r low[m, r] · factor[n, r].
    transposed=True:  out[m, k] = Σ_n x[m, n] · W[n, k] + Σ_r low[m, r] · factor[r, k].

    Attributes:
        contraction: length of the sum over k (or n).
        place: where the part's columns begin in x and out, where there are several parts.
        members: the adapted stretches of columns; see the body of matmul_wide.wgsl.
        bias, softcap, scaled: see `Product`; the bias's columns are those of out.
        x_largest: u32 [rows], of `row_scales`; None where rows of x are taken as they are. Rows of
            f16 that have sizes are multiplied by their powers already (`SizedRows.halves`).
        carried: whether low has the members' scales in it, and so the powers of their rows.
        epilogue: "write", "residual" (out = residual + …) or "accumulate" (out += …).
        x_block: of x's columns that are `InBlocks`; 0 where they are not.
        dropout: of what the members were given, member by member: transposed, each one's share of
            out is what its mask leaves (`takes_dropout`).
    """

    x: Tensor
    part: MatrixPart
    out: Tensor
    transposed: bool
    contraction: int
    place: Place | None = None
    members: tuple[dict[str, int], ...] = ()
    low: Tensor | None = None
    factor: Tensor | None = None
    rank: int = 0
    scale: float = 1.0
    residual: Tensor | None = None
    bias: Tensor | None = None
    softcap: float | None = None
    scaled: ScaledColumns | None = None
    epilogue: str = "write"
    x_largest: Tensor | None = None
    carried: bool = False
    x_block: int = 0
    dropout: GroupDropout | None = None

    @property
    def copied(self) -> bool:
        """Whether x is `SizedRows.halves`."""
        return self.x_largest is not None and self.x.dtype == "f16"

    @property
    def n_columns(self) -> int:
        """Columns that this part gives."""
        return self.out.shape[1] if self.transposed else self.part.out_features

    def constants(self, label: str) -> dict[str, Any]:
        """The template constants that the bodies share."""
        x, out, n_columns = self.x, self.out, self.n_columns
        if self.contraction % 4 or n_columns % 4 or x.shape[1] % 4 or self.rank % 4:
            raise ValueError(
                f"{label}: widths must be multiples of 4: {x.shape}, {out.shape}, {self.rank}"
            )
        return {
            "quantization": self.part.quantization.name,
            "transposed": self.transposed,
            "contraction": self.contraction,
            "n_columns": n_columns,
            "row_words": self.part.words.shape[1],
            "x_type": x.dtype,
            "out_type": out.dtype,
            "x_stride": x.shape[1],
            "x_block": self.x_block,
            "out_stride": out.shape[1],
            "placed": self.place is not None,
            "weight_columns": n_columns if self.transposed else self.contraction,
            "members": list(self.members),
            "rank": self.rank,
            "low_stride": self.low.shape[1] if self.members and self.low is not None else 0,
            "scale": self.scale,
            "epilogue": self.epilogue,
            "bias": self.bias is not None,
            "softcap": self.softcap,
            "scaled": None if self.scaled is None else {"kept_type": self.scaled.kept.dtype},
            "x_scaled": self.x_largest is not None,
            "powered": self.part.powers is not None,
            "low_carries": self.part.powers is not None and self.carried,
            "dropout": None
            if self.dropout is None
            else {**self.dropout.constants, "scale": self.dropout.scale},
        }
