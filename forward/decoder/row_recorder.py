"""What a block of a layer is recorded with for one row: its forms, its products, where it ends."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from lora.forward.decoder.step_inputs import StepInputs
from lora.forward.int_row import IntRow, RowNorm, takes_int_row, to_int_row
from lora.forward.matmul_int_row import matmul_int_row
from lora.forward.matmul_row import matmul_row, project_row
from lora.forward.model.factors import Factors, LoraFactors
from lora.forward.model.frozen_model import LayerWeights, Model
from lora.forward.model.norm import Norm
from lora.forward.model.weights import FrozenMatrix
from lora.forward.product import Product
from lora.forward.rmsnorm import rmsnorm
from lora.shaders.activations import extent_of
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor


@dataclass(frozen=True)
class Row:
    """One row on its way into a product.

    Attributes:
        values: [1, width].
        norm: the RMSNorm before the product; None for none.
        ints: what the product takes instead of the values; None if it takes these.
    """

    values: Tensor
    norm: Norm | None = None
    ints: IntRow | None = None


@dataclass(frozen=True)
class RowMemory:
    """Tensors that are made as programs need them.

    Attributes:
        rows: how many rows there are.
        low: z by its width: adapters differ in rank.
        products: before DoRA scales their columns, by their width.
        ints: rows of whole numbers, by what they are of and their width.
    """

    rows: Extent
    low: dict[int, Tensor] = field(default_factory=dict)
    products: dict[int, Tensor] = field(default_factory=dict)
    ints: dict[tuple[str, int], IntRow] = field(default_factory=dict)

    def z(self, recording: Recording, lora: LoraFactors) -> Tensor:
        """The tensor for the z of an adapted group."""
        width = lora.n_members * lora.rank
        if width not in self.low:
            shape = (self.rows.maximum, width)
            self.low[width] = recording.memory.empty(shape, extent=self.rows)
        return self.low[width]

    def product(self, recording: Recording, matrix: FrozenMatrix) -> Tensor:
        """The tensor for a product whose columns DoRA scales."""
        width = matrix.out_features
        if width not in self.products:
            shape = (self.rows.maximum, width)
            self.products[width] = recording.memory.empty(shape, extent=self.rows)
        return self.products[width]

    def before(
        self,
        recording: Recording,
        name: str,
        values: Tensor,
        matrix: FrozenMatrix,
        norm: Norm | None = None,
    ) -> Row:
        """One row in the form that a product with `matrix` takes.

        Args:
            name: the whole numbers of rows of one name lie in the same memory: none may be needed
                when the next is written.
            values: [1, width].
            norm: the RMSNorm between; None for none.
        """
        if not takes_int_row(recording, matrix):
            return Row(values, norm)
        key = name, values.shape[1]
        if key not in self.ints:
            self.ints[key] = IntRow.allocate(recording, values.shape[1], extent_of(values))
        return Row(values, norm, self.ints[key].before_norm(norm))


@dataclass(frozen=True)
class RowEnd:
    """Where the last product of a block goes: then = residual + norm(product).

    Attributes:
        residual: [1, hidden_size].
        post_norm: None for no norm.
        output: [1, hidden_size], the product itself, with a norm.
        then: in the form that the next product takes.
    """

    residual: Tensor
    post_norm: Norm | None
    output: Tensor | None
    then: Row


@dataclass(frozen=True)
class RowRecorder:
    """Appends the products of one layer for one row.

    Attributes:
        cache: of the layer.
        per_layer: what tokens have for the layers; None in models without.
    """

    program: Program
    model: Model
    layer: int
    inputs: StepInputs
    factors: Factors
    memory: RowMemory
    cache: Any
    per_layer: Tensor | None = None

    @property
    def weights(self) -> LayerWeights:
        """Of the layer."""
        return self.model.layers[self.layer]

    def before(self, name: str, values: Tensor, group: str) -> Row:
        """A row of the layer in the form that a group's product takes; see `RowMemory.before`."""
        matrix = self.weights.matrices[group]
        return self.memory.before(self.program.recording, name, values, matrix)

    def product(
        self,
        row: Row,
        group: str,
        out: Tensor,
        *,
        gate: str | None = None,
        residual: Tensor | None = None,
        then: Row | None = None,
    ) -> None:
        """Appends a group's product; arguments as of `Product` and `row_product`."""
        lora, weights = self.factors.get((self.layer, group)), self.weights
        z = None if lora is None else self.memory.z(self.program.recording, lora)
        product = Product(
            row.values,
            weights.matrices[group],
            lora=lora,
            z=z,
            gate=gate,
            bias=weights.biases.get(group),
            residual=residual,
        )
        row_product(self.program, row, product, out, then=then, label=group)

    def end(self, row: Row, group: str, end: RowEnd) -> None:
        """Appends the last product of a block."""
        then = end.then
        if end.output is None or end.post_norm is None:
            self.product(row, group, then.values, residual=end.residual, then=then)
            return
        self.product(row, group, end.output)
        if then.ints is not None:
            norm = RowNorm(end.post_norm, then.values, end.residual)
            to_int_row(self.program, end.output, then.ints, norm=norm, label="post_norm")
        else:
            rmsnorm(self.program, end.output, end.post_norm, residual=end.residual, out=then.values)


def row_product(
    program: Program,
    row: Row,
    product: Product,
    out: Tensor,
    *,
    then: Row | None = None,
    label: str,
) -> None:
    """Appends a product by the kernel that takes the row, and its z before it.

    Args:
        product: of row.values, without the row's norm; its z is where z is to be written, a new
            tensor by default.
        then: the row that `out` becomes, where another product takes it.
    """
    if product.lora is not None:
        z = project_row(
            program, row.values, product.lora, norm=row.norm, out=product.z, label=f"{label}.z"
        )
        product = replace(product, z=z)
    ints = None if then is None else then.ints
    if row.ints is not None:
        whole = replace(product, x=row.ints)
        matmul_int_row(program, whole, out=out, int_out=ints, label=label)
    else:
        matmul_row(program, replace(product, norm=row.norm), out=out, label=label)
    if row.ints is None and ints is not None:
        to_int_row(program, out, ints)
