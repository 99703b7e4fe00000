"""Mixers that carry a state, read out of a GGUF: LFM2's and Qwen3.5's layers beside attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lora.forward.gguf.metadata import Metadata
from lora.forward.model.layer_spec import Attention, BlockSpec
from lora.forward.model.recurrent_spec import (
    MOST_DELTA_HEAD,
    MOST_TAPS,
    GatedDeltaNet,
    ShortConvolution,
)
from lora.shaders.errors import InputError


def with_convolutions(metadata: Metadata, attentions: Sequence[Attention]) -> list[BlockSpec]:
    """LFM2's mixers: convolutions where a layer has no key heads.

    Args:
        metadata: of the model.
        attentions: what each layer would be.
    """
    width = metadata.size("embedding_length", multiple_of=4)
    convolution = ShortConvolution(width, _taps(metadata, "shortconv.l_cache"))
    return [one if one.n_kv_heads else convolution for one in attentions]


def with_delta_nets(metadata: Metadata, attentions: Sequence[Attention]) -> list[BlockSpec]:
    """Qwen3.5's mixers: DeltaNets, and attention with an output gate in every so-many-th layer.

    Args:
        metadata: of the model.
        attentions: what each layer would be, without the gate.

    Raises:
        InputError: sizes are missing, contradict each other, or are not supported.
    """
    n_layers = len(attentions)
    delta_net = _delta_net(metadata)
    recurrent = metadata.get("attention.recurrent_layers")
    if recurrent is None:
        every = metadata.size("full_attention_interval", 4)
        recurrent = [(layer + 1) % every != 0 for layer in range(n_layers)]
    n_more = metadata.get("nextn_predict_layers") or 0
    if isinstance(recurrent, list) and n_more and len(recurrent) == n_layers - n_more:
        recurrent = [*recurrent, *[False] * n_more]  # of those that predict further tokens
    if (
        not isinstance(recurrent, list)
        or len(recurrent) != n_layers
        or not all(isinstance(flag, bool) for flag in recurrent)
    ):
        raise InputError(
            f"{metadata.path}: {metadata.name}.attention.recurrent_layers is no list of "
            f"{n_layers} booleans, one a layer."
        )
    return [
        delta_net if flag else replace(one, output_gate=True)
        for one, flag in zip(attentions, recurrent, strict=True)
    ]


def _delta_net(metadata: Metadata) -> GatedDeltaNet:
    head_size = metadata.size("ssm.state_size", multiple_of=4)
    key_heads = metadata.size("ssm.group_count")
    value_heads = metadata.size("ssm.time_step_rank", multiple_of=4)
    inner = metadata.size("ssm.inner_size")
    if value_heads % key_heads or inner != value_heads * head_size or head_size > MOST_DELTA_HEAD:
        raise InputError(
            f"{metadata.path}: {key_heads} key heads and {value_heads} value heads of {head_size} "
            f"numbers, {inner} together, are not supported: value heads are as many as key heads "
            f"or some times that, all heads are of one size, {MOST_DELTA_HEAD} at most."
        )
    taps = _taps(metadata, "ssm.conv_kernel")
    return GatedDeltaNet(key_heads, value_heads, head_size, taps)


def _taps(metadata: Metadata, key: str) -> int:
    """Rows that a convolution sees.

    Raises:
        InputError: the file has no such number, or one that no kernel is unrolled for.
    """
    taps = metadata.size(key)
    if not 2 <= taps <= MOST_TAPS:
        raise InputError(
            f"{metadata.path}: {metadata.name}.{key} is {taps}; 2 to {MOST_TAPS} are supported."
        )
    return taps
