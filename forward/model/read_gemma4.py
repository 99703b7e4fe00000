"""Gemma 4's attention, read out of a GGUF: two kinds of layers, and layers that share keys.

Layers with a window and those that see all have heads of their own sizes, and ropes. The last
`attention.shared_kv_layers` layers have no keys and values: each takes those of the last layer of
its kind before them. Where a layer has no attn_v, what k is before its norm is v.
"""

from __future__ import annotations

from dataclasses import replace

from lora.forward.gguf.file import GGUFFile
from lora.forward.gguf.metadata import Metadata
from lora.forward.model.layer_spec import HEAD_NORM, MOST_HEAD_SIZE, Attention
from lora.forward.model.rope_frequencies import Rope, read_rope
from lora.shaders.errors import InputError


def read_gemma4_attentions(
    gguf_file: GGUFFile, metadata: Metadata, is_local: list[bool], n_layers: int
) -> list[Attention]:
    """The attention of every layer.

    Args:
        gguf_file: of the model.
        metadata: its own.
        is_local: layer by layer, whether it has a window.
        n_layers: of the model.

    Raises:
        InputError: sizes are missing, contradict each other, or are not supported.
    """
    n_heads = metadata.sizes("attention.head_count", n_layers)
    n_kv_heads = metadata.sizes("attention.head_count_kv", n_layers)
    if metadata.get("attention.global_head_count_kv") is not None:  # of older converters
        n_global = metadata.size("attention.global_head_count_kv")
        pairs = zip(is_local, n_kv_heads, strict=True)
        n_kv_heads = tuple(n if local else n_global for local, n in pairs)
    global_size = _head_size(metadata, "")
    local_size = _head_size(metadata, "_swa") if any(is_local) else global_size
    window = metadata.size("attention.sliding_window") if any(is_local) else None
    whole = read_rope(gguf_file, metadata, global_size, interleaved=False)
    local = _local_rope(metadata, whole, local_size)
    donors = _donors(metadata, is_local)
    found = []
    for layer in range(n_layers):
        if n_heads[layer] % n_kv_heads[layer]:
            raise InputError(
                f"{metadata.path}: {n_heads[layer]} heads of layer {layer} cannot share "
                f"{n_kv_heads[layer]} key and value heads evenly."
            )
        attention = Attention(
            n_heads=n_heads[layer],
            n_kv_heads=n_kv_heads[layer],
            head_size=local_size if is_local[layer] else global_size,
            rope=local if is_local[layer] else whole,
            window=window if is_local[layer] else None,
            scale=1.0,
            softcap=None,
            qk_norm=HEAD_NORM,
            fused_modules=False,
            permuted=False,
            value_norm=True,
            keys_are_values=donors[layer] is None
            and f"blk.{layer}.attn_v.weight" not in gguf_file.tensors,
            keys_of=donors[layer],
        )
        found.append(attention)
        donor = attention if donors[layer] is None else found[donors[layer] or 0]
        if (donor.n_kv_heads, donor.head_size) != (attention.n_kv_heads, attention.head_size):
            raise InputError(
                f"{metadata.path}: layer {layer} has other key heads than layer {donors[layer]}, "
                "whose keys and values it takes."
            )
    return found


def _donors(metadata: Metadata, is_local: list[bool]) -> list[int | None]:
    """Whose keys and values each layer takes; None for its own."""
    n_shared = metadata.get("attention.shared_kv_layers", 0)
    n_layers = len(is_local)
    if not isinstance(n_shared, int) or not 0 <= n_shared < n_layers:
        raise InputError(
            f"{metadata.path}: {metadata.name}.attention.shared_kv_layers is {n_shared}; a number "
            f"below the {n_layers} layers is expected."
        )
    own = n_layers - n_shared
    last = {kind: layer for layer, kind in enumerate(is_local[:own])}
    missing = set(is_local[own:]) - set(last)
    if missing:
        kind = "with a window" if True in missing else "without a window"
        raise InputError(
            f"{metadata.path}: layers {kind} share keys and values, and no layer of that kind has "
            "any."
        )
    return [None] * own + [last[kind] for kind in is_local[own:]]


def _head_size(metadata: Metadata, suffix: str) -> int:
    """Numbers in a head of one kind of layers."""
    key = f"attention.key_length{suffix}"
    size = metadata.size(key, multiple_of=8)
    value_size = metadata.size(f"attention.value_length{suffix}", size)
    if value_size != size or size > MOST_HEAD_SIZE:
        raise InputError(
            f"{metadata.path}: {metadata.name}.{key} is {size} and the values' {value_size}; equal "
            f"ones of at most {MOST_HEAD_SIZE} are supported."
        )
    return size


def _local_rope(metadata: Metadata, whole: Rope, head_size: int) -> Rope:
    """The rope of layers with a window: plain, with a base of its own."""
    base = metadata.positive_number("rope.local.freq_base", 10000.0)
    base = metadata.positive_number("rope.freq_base_swa", base)
    dimensions = metadata.size("rope.dimension_count_swa", head_size, multiple_of=2)
    if dimensions > head_size:
        raise InputError(
            f"{metadata.path}: {metadata.name}.rope.dimension_count_swa is {dimensions}, more than "
            f"the head size {head_size}."
        )
    plain = replace(whole, factor=1.0, divisors=(), yarn=None, long=None, amplitude=1.0)
    return replace(plain, base=base, dimensions=dimensions)
