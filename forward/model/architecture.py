"""What a model is made of, read out of a GGUF: one decoder, described by data.

The metadata keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A model that has
something which no field here describes is refused by name; it is never trained without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from lora.forward.gguf.file import GGUFFile
from lora.forward.gguf.metadata import Metadata
from lora.forward.model.families import Family, family_of
from lora.forward.model.model_tensors import check_tensors
from lora.forward.model.rope_frequencies import Rope, read_rope
from lora.shaders.errors import InputError


@dataclass(frozen=True)
class LayerKind:
    """What may differ from layer to layer."""

    window: int | None  # a row sees this many rows, itself included; None: all before it
    rope: Rope
    fused_qkv: bool = False  # q, k, v are one tensor of the file (convert_hf_to_gguf's --fuse-qkv)


@dataclass(frozen=True)
class Architecture:
    """The sizes and variants of one decoder; everything that forward/ needs to record it."""

    name: str  # general.architecture, for example "llama"
    n_layers: int  # decoder layers
    hidden_size: int  # width of the residual stream
    intermediate_size: int  # width inside the feed-forward block
    n_heads: int  # query heads
    n_kv_heads: int  # key and value heads; divides n_heads
    head_size: int  # numbers in a head; n_heads · head_size need not be hidden_size
    vocab_size: int  # rows of the embedding and of the head, padding rows included
    context_length: int  # tokens in a row that the model was trained for
    norm_epsilon: float  # added to the mean square in RMSNorm
    layer_kinds: tuple[LayerKind, ...]  # one a layer
    tied_head: bool  # the head is token_embd.weight itself; there is no output.weight
    activation: str  # of the gate: "silu" or "gelu_tanh"
    attention_scale: float  # scores are multiplied by it
    attention_softcap: float | None  # scores s become cap · tanh(s / cap)
    logit_softcap: float | None  # the same for the logits
    embedding_scale: float  # embeddings are multiplied by it
    qk_norm: bool  # every head of q and of k passes an RMSNorm before rope
    post_norms: bool  # what attention and feed-forward give is normed before it is added
    biases: frozenset[str]  # GGUF names (within a layer) of the matrices that have a bias
    fused: bool  # q, k, v are one module, gate and up another
    permuted: bool  # the rows of q and k are permuted within heads, for rope that turns neighbours

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
    def gate_up_size(self) -> int:
        """Width of gate and up side by side."""
        return 2 * self.intermediate_size

    @property
    def logits_size(self) -> int:
        """Width of the logits on the device: the vocabulary, padded to whole vec4."""
        return -(-self.vocab_size // 4) * 4

    @cached_property
    def matrices(self) -> Mapping[str, AdaptableMatrix]:
        """Its matrices that LoRA can adapt, by PEFT's names, the head last."""
        return {m.module: m for m in (*(_FUSED if self.fused else _SEPARATE), HEAD)}

    @cached_property
    def groups(self) -> Mapping[str, tuple[AdaptableMatrix, ...]]:
        """The matrices of a layer that share an input, in the order in which they are stacked."""
        return {
            name: tuple(m for m in self.matrices.values() if m.group == name)
            for name in ("qkv", "attn_output", "gate_up", "down")
        }

    def tensors_of(self, layer: int, group: str) -> tuple[str, ...]:
        """The names of the file's tensors that hold a group of a layer's matrices, in order."""
        if group == "qkv" and self.layer_kinds[layer].fused_qkv:
            return (f"blk.{layer}.{FUSED_QKV}.weight",)
        return tuple(matrix.tensor_name(layer) for matrix in self.groups[group])

    def place_of(self, layer: int, matrix: AdaptableMatrix) -> tuple[str, int]:
        """The file's tensor that holds a layer's matrix, and the first of its rows there."""
        tensors, members = self.tensors_of(layer, matrix.group), self.groups[matrix.group]
        if len(tensors) == len(members):
            return matrix.tensor_name(layer), 0
        before = members[: members.index(matrix)]
        return tensors[0], sum(member.out_size(self) for member in before)

    @classmethod
    def from_gguf(cls, gguf_file: GGUFFile) -> Architecture:
        """Reads the metadata and checks every tensor's name, shape and type against it.

        Raises:
            InputError: the file is no complete model, or the model has something that is not
                supported; the message names it.
        """
        family = family_of(gguf_file)
        metadata = Metadata(gguf_file)
        _check_nothing_unsupported(metadata)
        hidden_size = metadata.size("embedding_length", multiple_of=4)
        n_heads = metadata.size("attention.head_count")
        n_layers = metadata.size("block_count")
        head_size = metadata.size(
            "attention.key_length", max(1, hidden_size // n_heads), multiple_of=4
        )
        # A damaged block_count of billions must not become as many layers.
        if n_layers > len(gguf_file.tensors):
            raise InputError(
                f"{gguf_file.path} claims {n_layers} layers but holds only "
                f"{len(gguf_file.tensors)} tensors."
            )
        scores, logits = (
            metadata.optional_number(key, default)
            for key, default in zip(
                ("attn_logit_softcapping", "final_logit_softcapping"),
                family.softcaps or (0.0, 0.0),
                strict=True,
            )
        )
        architecture = cls(
            name=metadata.name,
            n_layers=n_layers,
            hidden_size=hidden_size,
            intermediate_size=metadata.size("feed_forward_length", multiple_of=4),
            n_heads=n_heads,
            n_kv_heads=metadata.size("attention.head_count_kv", n_heads),
            head_size=head_size,
            vocab_size=_vocab_size(gguf_file, metadata),
            context_length=metadata.size("context_length"),
            norm_epsilon=metadata.positive_number(
                "attention.layer_norm_rms_epsilon", family.default_epsilon
            ),
            layer_kinds=tuple(
                replace(kind, fused_qkv=_is_fused(gguf_file, family, layer))
                for layer, kind in enumerate(
                    _layer_kinds(gguf_file, metadata, family, n_layers, head_size)
                )
            ),
            tied_head="output.weight" not in gguf_file.tensors,
            activation=family.activation,
            attention_scale=(
                hidden_size / n_heads if n_layers == family.wide_scale_layers else head_size
            )
            ** -0.5,
            attention_softcap=scores,
            logit_softcap=logits,
            embedding_scale=hidden_size**0.5 if family.scaled_embedding else 1.0,
            qk_norm=family.qk_norm,
            post_norms=family.post_norms,
            biases=_biases(gguf_file, family),
            fused=family.fused,
            permuted=family.permuted,
        )
        _check_sizes(architecture, metadata, family)
        check_tensors(architecture.tensor_shapes(), gguf_file)
        return architecture

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the decoder reads, with its shape in numpy order."""
        hidden = (self.hidden_size,)
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocab_size, self.hidden_size),
            "output_norm.weight": hidden,
        }
        if not self.tied_head:
            shapes["output.weight"] = (self.vocab_size, self.hidden_size)
        for layer in range(self.n_layers):
            blk = f"blk.{layer}."
            shapes[blk + "attn_norm.weight"] = hidden
            shapes[blk + "ffn_norm.weight"] = hidden
            if self.qk_norm:
                shapes[blk + "attn_q_norm.weight"] = (self.head_size,)
                shapes[blk + "attn_k_norm.weight"] = (self.head_size,)
            if self.post_norms:
                shapes[blk + "post_attention_norm.weight"] = hidden
                shapes[blk + "post_ffw_norm.weight"] = hidden
            for group, members in self.groups.items():
                for matrix in members:
                    rows = matrix.out_size(self)
                    if not (group == "qkv" and self.layer_kinds[layer].fused_qkv):
                        shapes[matrix.tensor_name(layer)] = (rows, matrix.in_size(self))
                    if matrix.gguf_name in self.biases:
                        shapes[f"{blk}{matrix.gguf_name}.bias"] = (rows,)
            if self.layer_kinds[layer].fused_qkv:
                shapes[f"{blk}{FUSED_QKV}.weight"] = (self.qkv_size, self.hidden_size)
                if FUSED_QKV in self.biases:
                    shapes[f"{blk}{FUSED_QKV}.bias"] = (self.qkv_size,)
        return shapes


@dataclass(frozen=True)
class AdaptableMatrix:
    """A matrix that LoRA can adapt, under PEFT's name and under GGUF's.

    Attributes:
        module: PEFT's name for it, as in the config's `adapter.targets`.
        peft_parent: the module that holds it within a layer; "" for the head.
        gguf_name: its name within a layer of the GGUF.
        group: matrices of one group share their input and are stacked.
        in_field, out_field: the field of Architecture that is its number of columns, of rows.
        heads_field: the field that counts its heads where rope turns its output, else None.
    """

    module: str
    peft_parent: str
    gguf_name: str
    group: str
    in_field: str
    out_field: str
    heads_field: str | None = None

    def tensor_name(self, layer: int) -> str:
        """Its tensor in the GGUF, for example `blk.3.attn_q.weight`."""
        return f"blk.{layer}.{self.gguf_name}.weight"

    def peft_path(self, layer: int) -> str:
        """Its module in the Hugging Face model, e.g. `model.layers.3.self_attn.q_proj`."""
        if not self.peft_parent:
            return self.module
        return f"model.layers.{layer}.{self.peft_parent}.{self.module}"

    def in_size(self, architecture: Architecture) -> int:
        """Its number of columns: A is [rank, in_size]."""
        return int(getattr(architecture, self.in_field))

    def out_size(self, architecture: Architecture) -> int:
        """Its number of rows: B is [out_size, rank]."""
        return int(getattr(architecture, self.out_field))

    def permuted_heads(self, architecture: Architecture) -> int | None:
        """The heads within which the GGUF permutes its rows; None where the order is PEFT's."""
        if self.heads_field is None or not architecture.permuted:
            return None
        return int(getattr(architecture, self.heads_field))


FUSED_QKV = "attn_qkv"  # within a layer: rows of q, then of k, then of v
_QKV = frozenset(("attn_q", "attn_k", "attn_v"))


def _is_fused(gguf_file: GGUFFile, family: Family, layer: int) -> bool:
    """Whether the file has q, k and v of a layer in one tensor, though they are three modules."""
    return not family.fused and f"blk.{layer}.{FUSED_QKV}.weight" in gguf_file.tensors


def _biases(gguf_file: GGUFFile, family: Family) -> frozenset[str]:
    """The GGUF names of the biases that a layer has, of those that its family may have."""
    known = family.biases | ({FUSED_QKV} if family.biases >= _QKV else set())
    return frozenset(name for name in known if f"blk.0.{name}.bias" in gguf_file.tensors)


def _matrix(path: str, gguf_name: str, group: str, *sizes: str) -> AdaptableMatrix:
    parent, _, module = path.rpartition(".")
    return AdaptableMatrix(module, parent, gguf_name, group, *sizes)


_OUTPUT = _matrix("self_attn.o_proj", "attn_output", "attn_output", "query_size", "hidden_size")
_DOWN = _matrix("mlp.down_proj", "ffn_down", "down", "intermediate_size", "hidden_size")
_SEPARATE = (
    _matrix("self_attn.q_proj", "attn_q", "qkv", "hidden_size", "query_size", "n_heads"),
    _matrix("self_attn.k_proj", "attn_k", "qkv", "hidden_size", "kv_size", "n_kv_heads"),
    _matrix("self_attn.v_proj", "attn_v", "qkv", "hidden_size", "kv_size"),
    _OUTPUT,
    _matrix("mlp.gate_proj", "ffn_gate", "gate_up", "hidden_size", "intermediate_size"),
    _matrix("mlp.up_proj", "ffn_up", "gate_up", "hidden_size", "intermediate_size"),
    _DOWN,
)
_FUSED = (
    _matrix("self_attn.qkv_proj", "attn_qkv", "qkv", "hidden_size", "qkv_size"),
    _OUTPUT,
    _matrix("mlp.gate_up_proj", "ffn_up", "gate_up", "hidden_size", "gate_up_size"),
    _DOWN,
)
HEAD = _matrix("lm_head", "output", "head", "hidden_size", "vocab_size")
MODULE_NAMES = tuple(dict.fromkeys(m.module for m in (*_SEPARATE, *_FUSED, HEAD)))


# What a key must say (or be absent) for the decoder to be right, without the architecture prefix.
_NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_scale": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
}


def _check_nothing_unsupported(metadata: Metadata) -> None:
    for key, neutral in _NEUTRAL_VALUES.items():
        metadata.require(key, *neutral)


def _vocab_size(gguf_file: GGUFFile, metadata: Metadata) -> int:
    embedding = gguf_file.tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError(f"{gguf_file.path} lacks the tensor 'token_embd.weight'.")
    vocab_size = metadata.size("vocab_size", embedding.shape[0])
    tokens = gguf_file.metadata.get("tokenizer.ggml.tokens")
    n_tokens = len(tokens) if isinstance(tokens, list) else 0
    if n_tokens > vocab_size:
        raise InputError(
            f"{gguf_file.path}: its tokenizer has {n_tokens:,} tokens, its vocabulary only "
            f"{vocab_size:,} rows."
        )
    return vocab_size


def _layer_kinds(
    gguf_file: GGUFFile, metadata: Metadata, family: Family, n_layers: int, head_size: int
) -> tuple[LayerKind, ...]:
    """Window and rope of every layer."""
    rope = read_rope(gguf_file, metadata, head_size, interleaved=family.rope_interleaved)
    if metadata.get("attention.sliding_window", 0) in (0, None):
        # Positions divided by infinity turn nothing.
        still = replace(rope, factor=math.inf)
        every = family.no_rope_every or n_layers + 1
        return tuple(
            LayerKind(None, still if (layer + 1) % every == 0 else rope)
            for layer in range(n_layers)
        )
    local_rope = rope
    if family.local_rope_base is not None:
        # Ollama's converter calls it local.
        base = metadata.positive_number("rope.local.freq_base", family.local_rope_base)
        base = metadata.positive_number("rope.freq_base_swa", base)
        local_rope = replace(rope, base=base, factor=1.0, divisors=())
    local = LayerKind(metadata.size("attention.sliding_window"), local_rope)
    pattern = metadata.get("attention.sliding_window_pattern", family.window_pattern)
    if isinstance(pattern, list):
        if len(pattern) != n_layers or not all(isinstance(flag, bool) for flag in pattern):
            raise InputError(
                f"{metadata.path}: {metadata.name}.attention.sliding_window_pattern is no list of "
                f"{n_layers} booleans, one a layer."
            )
        is_local = pattern
    else:
        every = metadata.size("attention.sliding_window_pattern", family.window_pattern)
        is_local = [every == 1 or layer % every < every - 1 for layer in range(n_layers)]
    return tuple(local if flag else LayerKind(None, rope) for flag in is_local)


def _check_sizes(architecture: Architecture, metadata: Metadata, family: Family) -> None:
    """Checks what ties the sizes together."""
    if architecture.n_heads % architecture.n_kv_heads:
        raise InputError(
            f"{metadata.path}: {architecture.n_heads} heads cannot share "
            f"{architecture.n_kv_heads} key and value heads evenly."
        )
    value_length = metadata.size("attention.value_length", architecture.head_size)
    if value_length != architecture.head_size:
        raise InputError(
            f"{metadata.path}: {metadata.name}.attention.value_length is {value_length}, but the "
            f"keys' is {architecture.head_size}; different sizes are not supported."
        )
    if architecture.head_size > 256:
        raise InputError(
            f"{metadata.path}: heads of {architecture.head_size} numbers are not supported; 256 "
            "is the most."
        )
    capped = (architecture.attention_softcap, architecture.logit_softcap)
    if family.softcaps is None and capped != (None, None):
        raise InputError(
            f"{metadata.path}: soft caps {capped} in a model of the architecture "
            f"{metadata.name!r}, which has none, are not supported."
        )
