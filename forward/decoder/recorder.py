"""What a block of a layer is recorded with: the walk it is part of, its products, where it ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from lora.forward.attention import attention
from lora.forward.attention_decode import attention_decode
from lora.forward.attention_prompt import attention_prompt, prompt_cut
from lora.forward.copy_columns import copy_columns
from lora.forward.decoder.step_inputs import StepInputs
from lora.forward.dora import scale_columns
from lora.forward.dropout import Dropout
from lora.forward.head_norm_rope import HeadNormRopeAfter
from lora.forward.heads import Heads
from lora.forward.lora import lora_project
from lora.forward.matmul import matmul
from lora.forward.matmul_row import matmul_row
from lora.forward.model.factors import Factors
from lora.forward.model.frozen_model import LayerWeights, Model
from lora.forward.model.inputs import Inputs
from lora.forward.model.kv_cache import store_keys_values
from lora.forward.model.norm import Norm
from lora.forward.product import Product, ScaledColumns, scales_at_once
from lora.forward.rmsnorm import NormAfter
from lora.forward.rope import RopeAfter
from lora.forward.swiglu import GateAfter
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor

After = NormAfter | GateAfter | RopeAfter | HeadNormRopeAfter  # what may follow a product


@dataclass(frozen=True)
class Attending:
    """What attention reads and writes.

    Attributes:
        qkv: [rows, qkv_size], q and k normed and rotated.
        attended: [rows, query_size], written.
        lse: f32 [rows, n_heads], log-sum-exp of the scores, written where a backward follows.
        keys_of: the layer whose keys and values these rows take; None for those in qkv.
    """

    qkv: Tensor
    attended: Tensor
    lse: Tensor
    keys_of: int | None = None


class Context(Protocol):
    """Where rows stand, and what they see of each other: all that differs between walks."""

    @property
    def positions(self) -> Tensor:
        """u32 [rows]: rows of rope's tables."""

    @property
    def segments(self) -> Tensor:
        """u32 [rows, 2]: first row and end of each row's example, in walks through examples."""

    @property
    def one_row(self) -> bool:
        """Whether there is one row at most."""

    @property
    def per_layer(self) -> Tensor | None:
        """[rows, layers · size], what tokens have for the layers; None in models without."""

    def attend(self, program: Program, layer: int, heads: Heads, act: Attending) -> None:
        """Appends the attention of one layer."""


@dataclass(frozen=True)
class WithinExamples:
    """Rows of whole examples, which see what is before them in their own.

    Attributes:
        kept: keys and values [rows, 2 · kv_size] of the layers that others take them of.
        per_layer: see `Context`.
    """

    inputs: Inputs
    kept: Mapping[int, Tensor] = field(default_factory=dict)
    per_layer: Tensor | None = None
    one_row = False

    @property
    def positions(self) -> Tensor:
        """See `Context`."""
        return self.inputs.positions

    @property
    def segments(self) -> Tensor:
        """See `Context`."""
        return self.inputs.segments

    def attend(self, program: Program, layer: int, heads: Heads, act: Attending) -> None:
        """See `Context`."""
        segments, first = self.inputs.segments, heads.query_size
        n_columns = heads.qkv_size - first
        if act.keys_of is not None:
            kept = self.kept[act.keys_of]
            copy_columns(program, kept, 0, act.qkv, first, n_columns, label="shared_kv")
        elif layer in self.kept:
            kept = self.kept[layer]
            copy_columns(program, act.qkv, first, kept, 0, n_columns, label="kept_kv")
        attention(program, act.qkv, segments, heads, out=act.attended, lse=act.lse)


@dataclass(frozen=True)
class AfterCache:
    """New rows of a text, which see its cache, where they leave their own keys and values.

    Attributes:
        caches: of the layers.
        per_layer: see `Context`.
        opening: whether the text begins with these rows: they see each other and nothing else, so
            that the attention of training serves, by tiles.
        few: whether so few rows are in use that matrix units are no gain to their attention.
    """

    inputs: StepInputs
    caches: tuple[Any, ...]
    per_layer: Tensor | None = None
    opening: bool = False
    few: bool = False

    @property
    def positions(self) -> Tensor:
        """See `Context`."""
        return self.inputs.rope_rows

    @property
    def segments(self) -> Tensor:
        """See `Context`."""
        raise ValueError("rows after a cache are of one text")

    @property
    def one_row(self) -> bool:
        """See `Context`."""
        return self.inputs.rows.maximum == 1

    def attend(self, program: Program, layer: int, heads: Heads, act: Attending) -> None:
        """See `Context`."""
        segments, cache, rows = self.inputs.segments, self.caches[layer], act.qkv.shape[0]
        cut = None if self.few else prompt_cut(program.recording, rows, heads, self.inputs.room)
        if cut is not None:
            keep(program, self.inputs, cache, heads, act)
            positions = self.inputs.positions
            attention_prompt(program, act.qkv, positions, cache, heads, cut, out=act.attended)
            return
        if self.opening and segments is not None and act.keys_of is None:
            keep(program, self.inputs, cache, heads, act)
            attention(program, act.qkv, segments, heads, out=act.attended, lse=act.lse)
            return
        keep_and_attend(program, self.inputs, cache, heads, act)


def keep(program: Program, inputs: StepInputs, cache: Any, heads: Heads, act: Attending) -> None:
    """Appends: keys and values of new rows go into a layer's cache, where they are its own."""
    if act.keys_of is None:
        store_keys_values(program, act.qkv, inputs.positions, cache, query_size=heads.query_size)


def keep_and_attend(
    program: Program, inputs: StepInputs, cache: Any, heads: Heads, act: Attending
) -> None:
    """Appends: keys and values of new rows go into a layer's cache, and the rows attend to it.

    Where they are another layer's, the cache is that layer's and holds them.
    """
    keep(program, inputs, cache, heads, act)
    attention_decode(program, act.qkv, inputs.positions, cache, heads, out=act.attended)


@dataclass(frozen=True)
class Walk:
    """One way of rows through the layers.

    Attributes:
        factors: the adapters; empty for the bare model.
        dropout: of what the factors are given, in training.
    """

    model: Model
    factors: Factors
    context: Context
    dropout: Dropout | None = None


@dataclass(frozen=True)
class BlockEnd:
    """Where the last product of a block goes: out = residual + norm(product).

    Attributes:
        residual: [rows, hidden_size].
        out: [rows, hidden_size]; None leaves out what only the output needs.
        post_norm: None for no norm.
        output: [rows, hidden_size], the product itself, with a norm.
        following: the norm that takes out, recorded with what finishes it; None for none.
    """

    residual: Tensor
    out: Tensor | None
    post_norm: Norm | None
    output: Tensor | None
    following: NormAfter | None = None


@dataclass(frozen=True)
class LayerRecorder:
    """Appends the products of one layer.

    Attributes:
        z: [rows, members · rank], by adapted group.
        products: [rows, out_features], by group whose columns DoRA scales.
        projected: groups whose z the norm before them has written.
    """

    program: Program
    walk: Walk
    layer: int
    z: Mapping[str, Tensor]
    products: Mapping[str, Tensor] = field(default_factory=dict)
    projected: frozenset[str] = frozenset()

    @property
    def weights(self) -> LayerWeights:
        """Of the layer."""
        return self.walk.model.layers[self.layer]

    def product(
        self,
        source: Tensor,
        group: str,
        to: Tensor | None,
        *,
        residual: Tensor | None = None,
        then: After | None = None,
    ) -> None:
        """Appends a group's product, its low-rank part included; `to` None wants z alone.

        `then` is what follows the product.
        """
        lora = self.weights.powers.factors(group, self.walk.factors.get((self.layer, group)))
        z = self.z.get(group)
        if lora is not None and group not in self.projected:
            dropout = self.walk.dropout
            lora_project(
                self.program, source, lora, out=z, label=f"{group}.z",
                dropout=None if dropout is None else dropout.of(self.layer, group),
            )  # fmt: skip
        weights, scaled = self.weights, None
        if lora is not None and lora.dora is not None:
            raw, at_once = self.products[group], scales_at_once(self.program.recording)
            if to is None or self.walk.context.one_row or not at_once:
                self._product(
                    Product(source, weights.matrices[group], lora=lora, z=z), raw, None, group
                )
                if to is not None:
                    scale_columns(
                        self.program, raw, lora.dora.scales, to, bias=weights.biases.get(group),
                        residual=residual, label=f"{group}.scaled",
                    )  # fmt: skip
                    if then is not None:
                        then.record(self.program, to)
                return
            scaled = ScaledColumns(lora.dora.scales, raw)
        if to is None:
            return
        product = Product(
            source,
            weights.matrices[group],
            lora=lora,
            z=None if lora is None else z,
            bias=weights.biases.get(group),
            residual=residual,
            scaled=scaled,
        )
        self._product(product, to, then, group)

    def _product(self, product: Product, to: Tensor, then: After | None, label: str) -> None:
        if self.walk.context.one_row:
            matmul_row(self.program, product, out=to, label=label)
            if then is not None:
                then.record(self.program, to)
        else:
            matmul(self.program, product, out=to, then=then, label=label)

    def end(self, source: Tensor, group: str, end: BlockEnd) -> None:
        """Appends the last product of a block."""
        if end.post_norm is None:
            self.product(source, group, end.out, residual=end.residual, then=end.following)
            return
        # The norm's backward reads what it was given: recompute needs the product too.
        norm = None
        if end.out is not None:
            norm = NormAfter(end.post_norm, end.out, residual=end.residual)
        self.product(source, group, end.output, then=norm)
        if end.following is not None and end.out is not None:
            end.following.record(self.program, end.out)
