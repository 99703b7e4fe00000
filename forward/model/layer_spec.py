"""What a layer is made of, as a value: a block that mixes positions, and a feed-forward block.

Each kind of block is a class here, its sizes taken from the file, layer by layer. What the decoder
does for a kind stands in the tables of forward/decoder/blocks.py and backward/blocks.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lora.forward.model.adaptable import (
    ATTENTION,
    FUSED_ATTENTION,
    FUSED_GATED,
    GATED,
    LFM2_ATTENTION,
    LFM2_GATED,
    PER_LAYER,
    AdaptableMatrix,
)
from lora.forward.model.rope_frequencies import Rope, Temperature

MOST_HEAD_SIZE = 512  # numbers in a head that attention has kernels for

# What RMSNorm q and k pass: none; every head on its own, before rope or after it; all heads of q,
# and all of k, together before rope.
NO_NORM, HEAD_NORM, LATE_NORM, WIDTH_NORM = "none", "head", "head after rope", "width"


class BlockSpec(ABC):
    """What every kind of block says of itself."""

    @property
    @abstractmethod
    def matrices(self) -> tuple[AdaptableMatrix, ...]:
        """Its matrices, in the order in which they are used."""

    @property
    def vectors(self) -> Mapping[str, int]:
        """Widths of its other tensors, norms for example, by GGUF name within the layer."""
        return {}

    @property
    def stacks(self) -> Mapping[str, tuple[str, ...]]:
        """Which of its vectors lie one after another in a tensor on the device, by its name."""
        return {name: (name,) for name in self.vectors}

    @property
    def tables(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of its other small tensors, by their whole GGUF name within the layer."""
        return {}

    @property
    def constants(self) -> Mapping[str, np.ndarray]:
        """Numbers that its kernels take and no file holds, f32, by name."""
        return {}

    @property
    def recurrent(self) -> bool:
        """Whether what a text leaves for its next token is a state, in which none is told apart."""
        return False

    @property
    def sizes(self) -> tuple[object, ...]:
        """What decides the shapes of its activations; all of it where a kind doesn't say."""
        return (self,)


@dataclass(frozen=True)
class Attention(BlockSpec):
    """Grouped-query attention (Ainslie et al. 2023), its heads turned by rope.

    Attributes:
        n_heads: query heads.
        n_kv_heads: key and value heads; divides n_heads.
        head_size: numbers in a head; n_heads · head_size need not be hidden_size.
        rope: how the heads of q and k turn.
        window: a row sees this many rows, itself included; None: all before it.
        scale: scores are multiplied by it.
        softcap: scores s become softcap · tanh(s / softcap); None for no cap.
        qk_norm: the RMSNorm that q and k pass: NO_NORM, HEAD_NORM, LATE_NORM or
            WIDTH_NORM.
        fused_modules: q, k and v are one module of the Hugging Face model (Phi).
        permuted: the rows of q and k are permuted within heads in the file, for rope that turns
            neighbours.
        fused_tensor: q, k, v, three modules, are one tensor of the file (convert_hf_to_gguf's
            --fuse-qkv).
        temperature: of queries far into a text; None for none.
        value_norm: every head of v passes an RMSNorm without a weight.
        keys_are_values: v is what k is before its norm; the layer has no matrix of its own for it.
        keys_of: the layer whose keys and values it takes, having none; None for its own.
        lfm2_names: the module of its output has the name that Hugging Face's LFM2 gives it.
        output_gate: the product of q gives each head twice its numbers, the second half of which
            is a gate: what comes out is multiplied by its sigmoid.
    """

    n_heads: int
    n_kv_heads: int
    head_size: int
    rope: Rope
    window: int | None
    scale: float
    softcap: float | None
    qk_norm: str
    fused_modules: bool
    permuted: bool
    fused_tensor: bool = False
    temperature: Temperature | None = None
    value_norm: bool = False
    keys_are_values: bool = False
    keys_of: int | None = None
    lfm2_names: bool = False
    output_gate: bool = False

    def __post_init__(self) -> None:
        """Refuses what no kernel does."""
        if self.temperature is not None and self.qk_norm != NO_NORM:
            raise ValueError("queries that are normed after their product can't have a temperature")
        if self.value_norm and self.qk_norm != HEAD_NORM:
            raise ValueError("heads of v are normed beside those of q and k only")
        if self.output_gate and (self.qk_norm != HEAD_NORM or self.value_norm):
            raise ValueError("what is gated has heads of q and k normed, and those of v not")
        if (self.keys_are_values or self.keys_of is not None) and not self.value_norm:
            raise ValueError(
                "keys that are values, or another layer's, come with heads of v normed"
            )

    @property
    def query_rows(self) -> int:
        """Rows of the matrix of q: all query heads, with their gates."""
        return self.query_size * (2 if self.output_gate else 1)

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.n_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Width of all key heads (or all value heads) together."""
        return self.n_kv_heads * self.head_size

    @property
    def qkv_size(self) -> int:
        """Width of q, k and v side by side."""
        return self.query_size + 2 * self.kv_size

    @property
    def projected_size(self) -> int:
        """Columns of the product that gives q, k and v, or what the layer has of them."""
        if self.keys_of is not None:
            return self.query_size
        return self.query_rows + (1 if self.keys_are_values else 2) * self.kv_size

    @property
    def matrices(self) -> tuple[AdaptableMatrix, ...]:
        """See `BlockSpec`."""
        if self.fused_modules:
            return FUSED_ATTENTION
        if self.lfm2_names:
            return LFM2_ATTENTION
        q, k, v, output = ATTENTION
        if self.keys_of is not None:
            return q, output
        return (q, k, output) if self.keys_are_values else ATTENTION

    @property
    def vectors(self) -> Mapping[str, int]:
        """See `BlockSpec`."""
        if self.qk_norm == NO_NORM:
            return {}
        if self.keys_of is not None:
            return {Q_NORM: self.head_size}
        if self.qk_norm != WIDTH_NORM:
            return dict.fromkeys((Q_NORM, K_NORM), self.head_size)
        return {Q_NORM: self.query_size, K_NORM: self.kv_size}

    @property
    def norms_spans(self) -> bool:
        """Whether q and k are normed by `span_norm`, and not with rope by `head_norm_rope`."""
        return self.qk_norm in (LATE_NORM, WIDTH_NORM) or self.value_norm or self.output_gate

    @property
    def stacks(self) -> Mapping[str, tuple[str, ...]]:
        """See `BlockSpec`."""
        return {SPAN_NORMS: tuple(self.vectors)} if self.norms_spans else super().stacks

    @property
    def sizes(self) -> tuple[object, ...]:
        """See `BlockSpec`."""
        normed = self.qk_norm != NO_NORM, self.projected_size
        return Attention, self.n_heads, self.n_kv_heads, self.head_size, *normed


@dataclass(frozen=True)
class GatedFeedForward(BlockSpec):
    """down(activation(gate(x)) · up(x)) (Shazeer 2020, "GLU Variants Improve Transformer").

    Attributes:
        intermediate_size: width inside the block.
        activation: of the gate: "silu" or "gelu_tanh".
        fused_modules: gate and up are one module of the Hugging Face model (Phi).
        lfm2_names: the modules have the names that Hugging Face's LFM2 gives them.
    """

    intermediate_size: int
    activation: str
    fused_modules: bool
    lfm2_names: bool = False

    @property
    def gate_up_size(self) -> int:
        """Width of gate and up side by side."""
        return 2 * self.intermediate_size

    @property
    def matrices(self) -> tuple[AdaptableMatrix, ...]:
        """See `BlockSpec`."""
        if self.lfm2_names:
            return LFM2_GATED
        return FUSED_GATED if self.fused_modules else GATED

    @property
    def sizes(self) -> tuple[object, ...]:
        """See `BlockSpec`."""
        return GatedFeedForward, self.intermediate_size


@dataclass(frozen=True)
class PerLayerInput(BlockSpec):
    """proj(activation(inp_gate(x)) · its part of what the token has for every layer (Gemma 3n, 4).

    Attributes:
        size: numbers that a token has for a layer.
        layer: whose they are.
        activation: of the gate.
    """

    size: int
    layer: int
    activation: str

    @property
    def matrices(self) -> tuple[AdaptableMatrix, ...]:
        """See `BlockSpec`."""
        return PER_LAYER

    @property
    def sizes(self) -> tuple[object, ...]:
        """See `BlockSpec`."""
        return PerLayerInput, self.size


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: x += mixer(norm(x)), x += feed_forward(norm(x)).

    In some models then x += norm(per_layer(x)) and x *= output_scale.

    Attributes:
        hidden_size: width of the residual stream.
        norm_epsilon: added to the mean square in all its RMSNorms.
        post_norms: what each block gives is normed before it is added.
        biases: GGUF names (within the layer) of the matrices that have a bias.
        pre_norms: each block is given the normed residual stream, not the stream itself.
        feed_forward_norm: GGUF name (within the layer) of the norm before the feed-forward block.
        per_layer: the block after the feed-forward one; None for none.
        output_scale: what comes out is multiplied by a number of the layer's.
    """

    mixer: BlockSpec
    feed_forward: BlockSpec
    hidden_size: int
    norm_epsilon: float
    post_norms: bool
    biases: frozenset[str]
    pre_norms: bool = True
    feed_forward_norm: str = "ffn_norm"
    per_layer: PerLayerInput | None = None
    output_scale: bool = False

    @property
    def norms(self) -> tuple[str, ...]:
        """GGUF names (within the layer) of its norms of hidden_size numbers."""
        before = ("attn_norm", self.feed_forward_norm) if self.pre_norms else ()
        after = (POST_MIXER_NORM, POST_FEED_FORWARD_NORM) if self.post_norms else ()
        return (*before, *after, *(() if self.per_layer is None else (POST_PER_LAYER_NORM,)))

    @property
    def norms_outputs(self) -> bool:
        """Whether what some block of it gives is normed."""
        return self.post_norms or self.per_layer is not None

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """Its blocks, in the order in which they are used."""
        last = () if self.per_layer is None else (self.per_layer,)
        return (self.mixer, self.feed_forward, *last)

    @property
    def sizes(self) -> tuple[object, ...]:
        """What decides the shapes of its activations: layers of equal sizes can share them."""
        norms = self.pre_norms, self.post_norms
        return (*(block.sizes for block in self.blocks), self.hidden_size, norms)

    @property
    def rope(self) -> Rope | None:
        """How the mixer's heads turn; None for a mixer that turns nothing."""
        return getattr(self.mixer, "rope", None)

    @property
    def keys_of(self) -> int | None:
        """The layer whose keys and values the mixer takes; None for its own."""
        return getattr(self.mixer, "keys_of", None)

    @property
    def fused_tensor(self) -> bool:
        """Whether the matrices of q, k and v, three modules, are one tensor of the file."""
        return getattr(self.mixer, "fused_tensor", False)

    @cached_property
    def groups(self) -> Mapping[str, tuple[AdaptableMatrix, ...]]:
        """Matrices that share an input, by group: stacked in this order, used in this order."""
        found: dict[str, tuple[AdaptableMatrix, ...]] = {}
        for matrix in (matrix for block in self.blocks for matrix in block.matrices):
            found[matrix.group] = (*found.get(matrix.group, ()), matrix)
        return found


Q_NORM, K_NORM = "attn_q_norm", "attn_k_norm"  # within a layer: norms of heads
SPAN_NORMS = "attn_norms"  # those one after another
POST_MIXER_NORM, POST_FEED_FORWARD_NORM = "post_attention_norm", "post_ffw_norm"
POST_PER_LAYER_NORM, OUTPUT_SCALE = "post_norm", "layer_output_scale"
