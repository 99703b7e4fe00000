"""The layers of a model, read out of a GGUF's metadata, each with its own sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora.forward.gguf.file import GGUFFile
from lora.forward.gguf.metadata import Metadata
from lora.forward.model.adaptable import FUSED_QKV
from lora.forward.model.families import Family
from lora.forward.model.layer_spec import (
    MOST_HEAD_SIZE,
    OUTPUT_SCALE,
    Attention,
    BlockSpec,
    GatedFeedForward,
    LayerSpec,
    PerLayerInput,
)
from lora.forward.model.read_gemma4 import read_gemma4_attentions
from lora.forward.model.read_recurrent import with_convolutions, with_delta_nets
from lora.forward.model.rope_frequencies import (
    Rope,
    Temperature,
    check_rope,
    original_context,
    read_rope,
)
from lora.shaders.errors import InputError

_WIDEST_WINDOW = 1 << 30
_QKV = frozenset(("attn_q", "attn_k", "attn_v"))


def read_layers(gguf_file: GGUFFile, metadata: Metadata, family: Family) -> tuple[LayerSpec, ...]:
    """What each layer is made of.

    Raises:
        InputError: sizes are missing, contradict each other, or are not supported.
    """
    n_layers = metadata.size("block_count")
    # The last of them may be there to predict further tokens, each with lists' numbers of its own.
    n_more = metadata.size("nextn_predict_layers", 1) if metadata.get("nextn_predict_layers") else 0
    if n_more >= n_layers:
        raise InputError(f"{gguf_file.path}: all {n_layers} layers predict further tokens only.")
    if not family.two_kinds:
        metadata.require("attention.shared_kv_layers", 0)
    # A damaged block_count of billions must not become as many layers.
    if n_layers > len(gguf_file.tensors):
        raise InputError(
            f"{gguf_file.path} claims {n_layers} layers but holds only "
            f"{len(gguf_file.tensors)} tensors."
        )
    hidden_size = metadata.size("embedding_length", multiple_of=4)
    epsilon = metadata.positive_number("attention.layer_norm_rms_epsilon", family.default_epsilon)
    inputs_size = per_layer_size(metadata, family)
    multipliers = read_multipliers(metadata, family)
    widths = metadata.sizes("feed_forward_length", n_layers, multiple_of=4)
    layers = tuple(
        LayerSpec(
            mixer=mixer,
            feed_forward=GatedFeedForward(
                width, family.activation, family.fused_gate_up, family.short_convolutions
            ),
            hidden_size=hidden_size,
            norm_epsilon=epsilon / multipliers.residual**2,
            post_norms=family.post_norms,
            biases=_biases(gguf_file, family, layer),
            pre_norms=family.pre_norms,
            feed_forward_norm=family.feed_forward_norm,
            per_layer=PerLayerInput(inputs_size, layer, family.activation) if inputs_size else None,
            output_scale=f"blk.{layer}.{OUTPUT_SCALE}.weight" in gguf_file.tensors,
        )
        for layer, (mixer, width) in enumerate(
            zip(_mixers(gguf_file, metadata, family, n_layers), widths, strict=True)
        )
    )
    return layers[: n_layers - n_more]


def _mixers(
    gguf_file: GGUFFile, metadata: Metadata, family: Family, n_layers: int
) -> Sequence[BlockSpec]:
    """What mixes the positions in every layer."""
    attentions = _attentions(gguf_file, metadata, family, n_layers)
    if family.short_convolutions:
        return with_convolutions(metadata, attentions)
    return with_delta_nets(metadata, attentions) if family.delta_net else attentions


def _attentions(
    gguf_file: GGUFFile, metadata: Metadata, family: Family, n_layers: int
) -> list[Attention]:
    """The attention of every layer."""
    if family.two_kinds:
        is_local = _local_layers(metadata, family, n_layers)
        return read_gemma4_attentions(gguf_file, metadata, is_local, n_layers)
    hidden_size = metadata.size("embedding_length", multiple_of=4)
    n_heads = metadata.sizes("attention.head_count", n_layers)
    n_kv_heads = n_heads
    if metadata.get("attention.head_count_kv") is not None:
        n_kv_heads = metadata.sizes(
            "attention.head_count_kv", n_layers, none=family.short_convolutions
        )
    head_size = metadata.size(
        "attention.key_length", max(1, hidden_size // n_heads[0]), multiple_of=4
    )
    _check_heads(metadata, n_heads, n_kv_heads, head_size)
    wide = n_layers == family.wide_scale_layers
    softcap, _ = read_softcaps(metadata, family)
    multipliers = read_multipliers(metadata, family)
    temperature = _temperature(metadata, family)
    return [
        Attention(
            n_heads=n_heads[layer],
            n_kv_heads=n_kv_heads[layer],
            head_size=head_size,
            rope=rope,
            window=window,
            scale=multipliers.scores
            or (hidden_size / n_heads[layer] if wide else head_size) ** -0.5,
            softcap=softcap,
            qk_norm=family.qk_norm,
            fused_modules=family.fused_qkv,
            permuted=family.permuted,
            fused_tensor=_is_fused(gguf_file, family, layer),
            temperature=temperature,
            lfm2_names=family.short_convolutions,
        )
        for layer, (window, rope) in enumerate(
            _windows_and_ropes(gguf_file, metadata, family, n_layers, head_size)
        )
    ]


@dataclass(frozen=True)
class Multipliers:
    """Numbers that Granite has for what others have none.

    What each block gives is to be multiplied by `residual`. The residual stream is kept divided by
    it instead, so that blocks are added as they are: norms are the same when their epsilon is
    divided by its square, and the embedding's factor by itself.

    Attributes:
        embedding: of embeddings.
        scores: of attention's scores; None for the usual one.
        residual: of what the blocks give.
        logits: logits are divided by it.
    """

    embedding: float = 1.0
    scores: float | None = None
    residual: float = 1.0
    logits: float = 1.0


def read_multipliers(metadata: Metadata, family: Family) -> Multipliers:
    """The multipliers of a model; without any in other families, which have no such keys.

    Raises:
        InputError: one is no number above 0, or the family has none and the file does.
    """
    if not family.multipliers:
        for key in ("embedding_scale", "residual_scale", "logit_scale"):
            metadata.require(key, 0.0, 1.0)
        metadata.require("attention.scale", 0.0)
        return Multipliers()
    return Multipliers(
        embedding=metadata.optional_number("embedding_scale") or 1.0,
        scores=metadata.optional_number("attention.scale"),
        residual=metadata.optional_number("residual_scale") or 1.0,
        logits=metadata.optional_number("logit_scale") or 1.0,
    )


def _temperature(metadata: Metadata, family: Family) -> Temperature | None:
    """Of queries far into a text."""
    if not family.temperature:
        metadata.require("attention.temperature_scale", 0.0)
        return None
    scale = metadata.optional_number("attention.temperature_scale")
    return None if scale is None else Temperature(scale, original_context(metadata))


def per_layer_size(metadata: Metadata, family: Family) -> int:
    """Numbers that a token has for every layer beside its embedding; 0 for none.

    Raises:
        InputError: the file has some in a model of a family that has none.
    """
    key = "embedding_length_per_layer_input"
    if not family.two_kinds:
        metadata.require(key, 0)
    return metadata.size(key, multiple_of=4) if metadata.get(key, 0) else 0


def read_softcaps(metadata: Metadata, family: Family) -> tuple[float | None, float | None]:
    """The caps of attention scores and of logits.

    Raises:
        InputError: there are some in a model of a family that has none.
    """
    defaults = family.softcaps or (0.0, 0.0)
    scores = metadata.optional_number("attn_logit_softcapping", defaults[0])
    logits = metadata.optional_number("final_logit_softcapping", defaults[1])
    if family.softcaps is None and (scores, logits) != (None, None):
        raise InputError(
            f"{metadata.path}: soft caps {scores, logits} in a model of the architecture "
            f"{metadata.name!r}, which has none, are not supported."
        )
    return scores, logits


def _check_heads(
    metadata: Metadata, n_heads: Sequence[int], n_kv_heads: Sequence[int], head_size: int
) -> None:
    """Checks what ties the sizes of heads together."""
    for queries, keys in zip(n_heads, n_kv_heads, strict=True):
        if keys and queries % keys:
            raise InputError(
                f"{metadata.path}: {queries} heads cannot share {keys} key and value heads evenly."
            )
    value_length = metadata.size("attention.value_length", head_size)
    if value_length != head_size:
        raise InputError(
            f"{metadata.path}: {metadata.name}.attention.value_length is {value_length}, but the "
            f"keys' is {head_size}; different sizes are not supported."
        )
    if head_size > MOST_HEAD_SIZE:
        raise InputError(
            f"{metadata.path}: heads of {head_size} numbers are not supported; {MOST_HEAD_SIZE} "
            "is the most."
        )


def _is_fused(gguf_file: GGUFFile, family: Family, layer: int) -> bool:
    """Whether the file has q, k and v of a layer in one tensor, though they are three modules."""
    return not family.fused_qkv and f"blk.{layer}.{FUSED_QKV}.weight" in gguf_file.tensors


def _biases(gguf_file: GGUFFile, family: Family, layer: int) -> frozenset[str]:
    """The GGUF names of the biases that a layer has, of those that its family may have."""
    known = family.biases | ({FUSED_QKV} if family.biases >= _QKV else set())
    return frozenset(name for name in known if f"blk.{layer}.{name}.bias" in gguf_file.tensors)


def _windows_and_ropes(
    gguf_file: GGUFFile, metadata: Metadata, family: Family, n_layers: int, head_size: int
) -> list[tuple[int | None, Rope]]:
    """Window (None: all rows before it are seen) and rope of every layer."""
    rope = read_rope(
        gguf_file, metadata, head_size, interleaved=family.rope_interleaved,
        log_multiplier=family.temperature,
    )  # fmt: skip
    if family.multipliers and metadata.get("rope.scaling.finetuned") is False:
        rope = replace(rope, factor=math.inf)  # llama.cpp reads the key so in Granite
    if metadata.get("attention.sliding_window", 0) in (0, None):
        # Positions divided by infinity turn nothing.
        still = replace(rope, factor=math.inf)
        every = family.no_rope_every or n_layers + 1
        return [(None, still if (layer + 1) % every == 0 else rope) for layer in range(n_layers)]
    local_rope = rope
    if family.plain_local_rope:
        local_rope = replace(rope, factor=1.0, divisors=(), yarn=None, amplitude=1.0)
    if family.local_rope_base is not None:
        # Ollama's converter calls it local.
        base = metadata.positive_number("rope.local.freq_base", family.local_rope_base)
        base = metadata.positive_number("rope.freq_base_swa", base)
        local_rope = replace(rope, base=base, factor=1.0, divisors=())
        check_rope(metadata, local_rope)
    # Some converters write the largest number for none; kernels add it to positions.
    local = min(metadata.window("attention.sliding_window"), _WIDEST_WINDOW), local_rope
    is_local = _local_layers(metadata, family, n_layers)
    whole = None, rope if family.global_rope else replace(rope, factor=math.inf)
    return [local if flag else whole for flag in is_local]


def _local_layers(metadata: Metadata, family: Family, n_layers: int) -> list[bool]:
    """Which layers have a window, in a model where some have."""
    pattern = metadata.get("attention.sliding_window_pattern", family.window_pattern)
    if isinstance(pattern, list):
        if len(pattern) != n_layers or not all(isinstance(flag, bool) for flag in pattern):
            raise InputError(
                f"{metadata.path}: {metadata.name}.attention.sliding_window_pattern is no list of "
                f"{n_layers} booleans, one a layer."
            )
        return pattern
    every = metadata.size("attention.sliding_window_pattern", family.window_pattern)
    return [every == 1 or layer % every < every - 1 for layer in range(n_layers)]
