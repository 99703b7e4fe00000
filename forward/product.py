"""Products with frozen matrices, as values that every kernel of theirs takes."""

from __future__ import annotations

from dataclasses import dataclass

from lora.forward.int_row import IntRow
from lora.forward.model.factors import LoraFactors
from lora.forward.model.norm import Norm
from lora.forward.model.weights import FrozenMatrix
from lora.forward.swiglu import check_activation
from lora.shaders.activations import check_f32, check_shape
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

# What a product that scales its columns may bind with all else that there is.
_SCALED_BUFFERS = 12


def scales_at_once(recording: Recording) -> bool:
    """Whether products may scale their columns on the way out (`ScaledColumns`)."""
    return recording.facts.most_storage_buffers >= _SCALED_BUFFERS


@dataclass(frozen=True)
class ScaledColumns:
    """What a product's columns are multiplied by, before bias and residual (DoRA).

    Attributes:
        scales: f32 [out_features].
        kept: [rows, out_features], f32 or f16, written: the product before that.
    """

    scales: Tensor
    kept: Tensor


@dataclass(frozen=True)
class Product:
    """y = cap(scales ∘ (norm(x) · Wᵀ + scale · z · Bᵀ) + bias) + residual.

    The low-rank part is a few more steps of the same contraction (Hu et al. 2021, "LoRA").

    Attributes:
        x: [rows, in_features]; a row of whole numbers for `matmul_int_row`.
        x_largest: u32 [rows], where rows of x are f16 that is scaled already (`SizedRows.halves`),
            for matrix units; None for others.
        matrix: W [out_features, in_features].
        lora: the factors of the adapted members of W, or None.
        z: [rows, members · rank] = norm(x) · Aᵀ, needed with `lora`.
        bias: [out_features], added where given.
        softcap: y becomes softcap · tanh(y / softcap); None for none.
        residual: [rows, out_features], added where given; not the tensor that is written.
        gate: an activation that forward/swiglu.py lists, for one row: the first half of W's rows
            are a gate's, the others those of up, and activation(gate) · up is what comes out. W
            must be one part (`can_gate`); a softcap or a residual there is none.
        norm: what x passes first, for one row of f32; None for nothing.
        scaled: of many rows, where `scales_at_once` says so; None for ones.
    """

    x: Tensor | IntRow
    matrix: FrozenMatrix
    lora: LoraFactors | None = None
    z: Tensor | None = None
    bias: Tensor | None = None
    softcap: float | None = None
    residual: Tensor | None = None
    gate: str | None = None
    norm: Norm | None = None
    scaled: ScaledColumns | None = None
    x_largest: Tensor | None = None

    @property
    def width(self) -> int:
        """Columns that come out."""
        return self.matrix.out_features // (1 if self.gate is None else 2)

    @property
    def epilogue(self) -> str:
        """As the templates call what is done with the sums."""
        return "write" if self.residual is None else "residual"

    def check(self, rows: int | None, label: str) -> None:
        """Refuses terms that do not fit the matrix.

        Args:
            rows: of x; None where they are checked later.
            label: what the product is called.
        """
        check_f32(label, z=self.z, residual=self.residual, bias=self.bias)
        if self.bias is not None:
            check_shape(f"{label} bias", self.bias, self.matrix.out_features)
        if self.residual is not None:
            check_shape(f"{label} residual", self.residual, rows, self.matrix.out_features)
        if self.scaled is not None:
            check_f32(label, scales=self.scaled.scales)
            check_shape(f"{label} scales", self.scaled.scales, self.matrix.out_features)
            check_shape(f"{label} kept", self.scaled.kept, rows, self.matrix.out_features)
        if self.lora is not None and self.z is None:
            raise ValueError(f"{label}: an adapted matrix needs z and its factors")

    def check_row(self, label: str) -> None:
        """Refuses what no product of one row can do."""
        matrix = self.matrix
        self.check(1, label)
        if self.scaled is not None or self.x_largest is not None:
            raise ValueError(f"{label}: columns and x are scaled of many rows")
        if self.gate is not None:
            check_activation(self.gate)
            if not can_gate(matrix) or self.softcap is not None or self.residual is not None:
                raise ValueError(f"{label}: a gate takes one part, no softcap and no residual")
        if matrix.in_features % 4 or (self.lora is not None and self.lora.rank % 4):
            raise ValueError(f"{label}: widths must be multiples of 4: {matrix.in_features}")
        if self.lora is not None and self.z is not None:
            check_shape(f"{label} z", self.z, 1, self.lora.n_members * self.lora.rank)
        for part in matrix.parts:
            if part.out_features % 4 or part.first_feature % 4:
                raise ValueError(f"{label}: parts must be whole quads of rows: {part.words.shape}")


def can_gate(matrix: FrozenMatrix) -> bool:
    """Whether a product of one row can take the rows of gate and up together."""
    return len(matrix.parts) == 1 and matrix.out_features % 8 == 0
