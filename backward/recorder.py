"""What a block's backward is recorded with: the pass it is part of, its products' gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora.backward.before import AddBefore, Before, SourceBefore
from lora.backward.dora import dora_gradient
from lora.backward.dropout import dropout_input_gradient
from lora.backward.lora import GroupGradients, ScaledGradient, scales_columns
from lora.backward.lora_pending import PendingGradients
from lora.backward.matmul import Accumulate, Dropped, matmul_backward
from lora.forward.cross_entropy import Criterion
from lora.forward.dropout import Dropout, GroupDropout
from lora.forward.matmul_matrix import takes_dropout
from lora.forward.matmul_paired import row_scales
from lora.forward.model.factors import Factors, LoraFactors
from lora.forward.model.frozen_model import LayerWeights, Model
from lora.forward.model.inputs import Inputs
from lora.forward.model.weights import FrozenMatrix, with_powers
from lora.forward.part_product import SizedRows
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor

N_OTHERS = 6  # storage buffers that a product of the backward binds beside the sizes of its rows
Gradients = Mapping[tuple[int, str], Sequence[LoraFactors]]  # the slices, by (layer, group)


@dataclass
class StreamGradient:
    """The gradient to the residual stream, carried downwards while a program is recorded.

    Attributes:
        rows: f32 [rows, hidden_size].
        largest: u32 [rows], where their sizes go; None where no product asks for them.
        halves: f16 [rows, hidden_size], where their copy for matrix units goes (`SizedRows`),
            together with their sizes; None where kernels read the rows themselves.
        sized: whether they are there, as far as the program is recorded.
    """

    rows: Tensor
    largest: Tensor | None
    halves: Tensor | None = None
    sized: bool = False

    def write(self, *, asked: bool = False) -> SizedRows:
        """Where its next writer is to write it.

        Args:
            asked: whether that can write the sizes and the copy, too, and the next reader asks for
                them.
        """
        self.sized = asked and self.largest is not None
        return self.read()

    def read(self) -> SizedRows:
        """The rows as they are, with their sizes and the copy where these are known."""
        if not self.sized:
            return SizedRows(self.rows, None)
        return SizedRows(self.rows, self.largest, self.halves)


@dataclass(frozen=True)
class Scratch:
    """Gradients of activations, shared by all layers; types as in LayerActivations.

    Attributes:
        stream: the gradient to the residual stream.
        d_normed: [rows, hidden_size].
        d_output: [rows, hidden_size], below a post norm, with post_norms.
        blocks: by the `sizes` of a block, as the table allocates it.
        d_kept: f32 [rows, 2 · kv_size], of keys and values that other layers take, by their layer.
        d_z: [rows, width], by width: two where gradients wait, since what waits reads one.
        d_products: [rows, width], by width and type, of products whose columns DoRA scales, but
            where the kernels that read them do (`scales_columns`).
        d_head_z: [targets, rank], where the head is adapted.
        d_head_normed: [targets, hidden_size].
    """

    stream: StreamGradient
    d_normed: Tensor
    d_output: Tensor | None
    blocks: Mapping[tuple[object, ...], Any]
    d_kept: Mapping[int, Tensor]
    d_z: Mapping[int, tuple[Tensor, ...]]
    d_head_z: Tensor | None
    d_head_normed: Tensor
    d_products: Mapping[tuple[int, str], Tensor] = field(default_factory=dict)

    @property
    def d_x(self) -> Tensor:
        """The rows of the stream's gradient."""
        return self.stream.rows


@dataclass(frozen=True)
class BackwardPass:
    """What the head and all layers go backward with.

    Attributes:
        gradients: the slices that gradients of A and B are added to.
        per_layer: what tokens have for the layers; None in models without.
        dropout: as in the forward.
        criterion: what is minimized; None for −log p of each label.
        d_tokens: f32 [tokens in whole quads, hidden_size], what the gradient to trained tokens'
            rows is added to; None where none are.
        pending: what appends d_z and the gradients of layers' factors.
    """

    model: Model
    inputs: Inputs
    factors: Factors
    gradients: Gradients
    scratch: Scratch
    per_layer: Tensor | None = None
    dropout: Dropout | None = None
    criterion: Criterion | None = None
    d_tokens: Tensor | None = None
    pending: PendingGradients = field(default_factory=PendingGradients)


@dataclass(frozen=True)
class InputGradient:
    """The gradient to what an adapted matrix was given.

    Attributes:
        d_y: [rows, out_features], see `matmul_backward`.
        lora, d_z: the factors and the gradient to their z; None where it is not adapted.
        dropout: before the factors: what comes through them then has masks of its own, member by
            member. On matrix units the product takes it all the same; elsewhere it is written
            before, and no part of the contraction.
    """

    d_y: Tensor | SizedRows
    matrix: FrozenMatrix
    lora: LoraFactors | None
    d_z: Tensor | None
    dropout: GroupDropout | None

    def record(
        self, program: Program, out: Tensor, before: SourceBefore | Accumulate | None, label: str
    ) -> None:
        """Appends it; `out` and `before` as of `matmul_backward`."""
        lora, d_z, dropout = self.lora, self.d_z, self.dropout
        if dropout is None or lora is None or d_z is None or takes_dropout(program.recording):
            masked = d_z if dropout is None or d_z is None else Dropped(d_z, dropout)
            matmul_backward(
                program, self.d_y, self.matrix, lora=lora, d_z=masked, out=out, before=before,
                label=label,
            )  # fmt: skip
            return
        accumulates = isinstance(before, Accumulate)
        dropout_input_gradient(program, d_z, lora, dropout, out=out, accumulate=accumulates)
        matmul_backward(program, self.d_y, self.matrix, out=out, before=Accumulate(), label=label)
        if isinstance(before, SourceBefore):
            before.record(program, out)


@dataclass(frozen=True)
class BackwardRecorder:
    """Appends the gradients of one layer's products.

    Attributes:
        z: [rows, members · rank], by adapted group.
        products: of the forward, by group whose columns DoRA scales.
        last: the group below which nothing is wanted; "" where all is.
        shares: whether other layers' forwards have overwritten what products were given by a
            `SourceBefore`, which then writes it again before the factors' gradients read it.
    """

    program: Program
    shared: BackwardPass
    layer: int
    z: Mapping[str, Tensor]
    last: str
    products: Mapping[str, Tensor] = field(default_factory=dict)
    shares: bool = False

    @property
    def weights(self) -> LayerWeights:
        """Of the layer."""
        return self.shared.model.layers[self.layer]

    def scratch(self, block: Any) -> Any:
        """What the table has allocated for a block of the layer."""
        return self.shared.scratch.blocks[block.sizes]

    def through(
        self,
        group: str,
        source: Tensor,
        d_y: Tensor | SizedRows,
        out: Tensor,
        before: Before | None = None,
    ) -> bool:
        """Appends the gradients of a group's factors, and of its input or what lies before that.

        Args:
            source: [rows, in_features], what the product was given.
            d_y: [rows, out_features]; where the sizes of its rows are known, none are found.
            out: [rows, in_features], the gradient to source; or unwritten, or overwritten, where
                something lies before.
            before: what gave source, or the residual stream; None for what is recorded elsewhere.

        Returns:
            Whether anything below the group is wanted; if not, `out` is not written, nor is
            anything of what lies before. What the group's gradients read may not be overwritten
            before the next `through`.
        """
        pending = self.shared.pending
        lora = self.weights.powers.factors(group, self.shared.factors.get((self.layer, group)))
        z, d_z, wanted = self.z.get(group), None, group != self.last
        dropout: GroupDropout | None = None
        given = d_y if isinstance(d_y, SizedRows) else SizedRows(d_y, None)
        matrix, scaled = self.weights.matrices[group], None
        if lora is not None and lora.dora is not None:
            if scales_columns(self.program.recording, given.rows.shape[0], lora):
                dora = lora.dora
                scaled = ScaledGradient(self.products[group], dora.scales, dora.inverses)
                matrix = with_powers(matrix, dora.powers)
            else:
                given = SizedRows(self._scaled(group, given.rows, lora), None)
        # The stream's gradient may be far from what f16 holds (Qwen3, GLM, Gemma: unsloth-zoo#866).
        if given.largest is None:
            largest = row_scales(self.program, given.rows, N_OTHERS, f"{group}_backward")
            given = SizedRows(given.rows, largest)
        if lora is not None:
            d_z = pending.free(self.shared.scratch.d_z[lora.n_members * lora.rank])
            scales = None if scaled is None else scaled.scales
            pending.project(self.program, given, lora, d_z, scales)
            if self.shared.dropout is not None:
                dropout = self.shared.dropout.of(self.layer, group)
            if self.shares and isinstance(before, SourceBefore):
                before = replace(before, again=source)
        else:
            pending.flush(self.program)
        if wanted:
            product = InputGradient(given, matrix, lora, d_z, dropout)
            if isinstance(before, AddBefore):
                product.record(self.program, before.out, Accumulate(), f"{group}_backward")
            else:
                product.record(self.program, out, before, f"{group}_backward")
        elif isinstance(before, SourceBefore) and before.again is not None:
            before.repeat(self.program, source)
        if lora is not None and z is not None and d_z is not None:
            slices = self.shared.gradients[self.layer, group]
            pending.add(
                self.program, GroupGradients(source, z, given, d_z, lora, slices, dropout, scaled)
            )
            if lora.dora is not None and scaled is None:  # its d_y is the next group's scratch
                pending.flush(self.program)
        return wanted

    def _scaled(self, group: str, d_y: Tensor, lora: LoraFactors) -> Tensor:
        """Appends the gradients of magnitudes, and to the product whose columns they scale."""
        scaled = self.shared.scratch.d_products[d_y.shape[1], d_y.dtype]
        d_magnitudes = self.shared.gradients[self.layer, group][0].magnitude
        assert d_magnitudes is not None  # one layout has both
        dora_gradient(self.program, d_y, self.products[group], lora, d_magnitudes, scaled)
        return scaled
