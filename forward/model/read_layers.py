"""The layers of a model, read out of a GGUF's metadata, each with its own sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lora.forward.gguf.file import GGUFFile
from lora.forward.gguf.metadata import Metadata
from lora.forward.model.families import Family
from lora.forward.model.layer_spec import (
    FUSED_QKV,
    MOST_HEAD_SIZE,
    Attention,
    GatedFeedForward,
    LayerSpec,
)
from lora.forward.model.rope_frequencies import Rope, check_rope, read_rope
from lora.shaders.errors import InputError

_WIDEST_WINDOW = 1 << 30
_QKV = frozenset(("attn_q", "attn_k", "attn_v"))


def read_layers(gguf_file: GGUFFile, metadata: Metadata, family: Family) -> tuple[LayerSpec, ...]:
    """What each layer is made of.

    Raises:
        InputError: sizes are missing, contradict each other, or are not supported.
    """
    n_layers = metadata.size("block_count")
    # A damaged block_count of billions must not become as many layers.
    if n_layers > len(gguf_file.tensors):
        raise InputError(
            f"{gguf_file.path} claims {n_layers} layers but holds only "
            f"{len(gguf_file.tensors)} tensors."
        )
    hidden_size = metadata.size("embedding_length", multiple_of=4)
    epsilon = metadata.positive_number("attention.layer_norm_rms_epsilon", family.default_epsilon)
    widths = metadata.sizes("feed_forward_length", n_layers, multiple_of=4)
    return tuple(
        LayerSpec(
            mixer=mixer,
            feed_forward=GatedFeedForward(width, family.activation, family.fused),
            hidden_size=hidden_size,
            norm_epsilon=epsilon,
            post_norms=family.post_norms,
            biases=_biases(gguf_file, family, layer),
        )
        for layer, (mixer, width) in enumerate(
            zip(_attentions(gguf_file, metadata, family, n_layers), widths, strict=True)
        )
    )


def _attentions(
    gguf_file: GGUFFile, metadata: Metadata, family: Family, n_layers: int
) -> list[Attention]:
    """The attention of every layer."""
    hidden_size = metadata.size("embedding_length", multiple_of=4)
    n_heads = metadata.sizes("attention.head_count", n_layers)
    n_kv_heads = n_heads
    if metadata.get("attention.head_count_kv") is not None:
        n_kv_heads = metadata.sizes("attention.head_count_kv", n_layers)
    head_size = metadata.size(
        "attention.key_length", max(1, hidden_size // n_heads[0]), multiple_of=4
    )
    _check_heads(metadata, n_heads, n_kv_heads, head_size)
    wide = n_layers == family.wide_scale_layers
    softcap, _ = read_softcaps(metadata, family)
    return [
        Attention(
            n_heads=n_heads[layer],
            n_kv_heads=n_kv_heads[layer],
            head_size=head_size,
            rope=rope,
            window=window,
            scale=(hidden_size / n_heads[layer] if wide else head_size) ** -0.5,
            softcap=softcap,
            qk_norm=family.qk_norm,
            fused_modules=family.fused,
            permuted=family.permuted,
            fused_tensor=_is_fused(gguf_file, family, layer),
        )
        for layer, (window, rope) in enumerate(
            _windows_and_ropes(gguf_file, metadata, family, n_layers, head_size)
        )
    ]


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
        if queries % keys:
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
    return not family.fused and f"blk.{layer}.{FUSED_QKV}.weight" in gguf_file.tensors


def _biases(gguf_file: GGUFFile, family: Family, layer: int) -> frozenset[str]:
    """The GGUF names of the biases that a layer has, of those that its family may have."""
    known = family.biases | ({FUSED_QKV} if family.biases >= _QKV else set())
    return frozenset(name for name in known if f"blk.{layer}.{name}.bias" in gguf_file.tensors)


def _windows_and_ropes(
    gguf_file: GGUFFile, metadata: Metadata, family: Family, n_layers: int, head_size: int
) -> list[tuple[int | None, Rope]]:
    """Window (None: all rows before it are seen) and rope of every layer."""
    rope = read_rope(gguf_file, metadata, head_size, interleaved=family.rope_interleaved)
    if metadata.get("attention.sliding_window", 0) in (0, None):
        # Positions divided by infinity turn nothing.
        still = replace(rope, factor=math.inf)
        every = family.no_rope_every or n_layers + 1
        return [(None, still if (layer + 1) % every == 0 else rope) for layer in range(n_layers)]
    local_rope = rope
    if family.local_rope_base is not None:
        # Ollama's converter calls it local.
        base = metadata.positive_number("rope.local.freq_base", family.local_rope_base)
        base = metadata.positive_number("rope.freq_base_swa", base)
        local_rope = replace(rope, base=base, factor=1.0, divisors=())
        check_rope(metadata, local_rope)
    # Some converters write the largest number for none; kernels add it to positions.
    local = min(metadata.window("attention.sliding_window"), _WIDEST_WINDOW), local_rope
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
    return [local if flag else (None, rope) for flag in is_local]
