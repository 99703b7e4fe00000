"""Adapters whose modules the model at hand has under other names: fused ones apart, or together.

Hugging Face's Phi has q, k and v in one module, qkv_proj, and other families three; the same model
comes under both, as a Phi converted to Llama's layout does. Rows of a fused matrix are those of its
parts, one after another. So a fused B is cut into rows, each part with the whole A; and parts
become one with their As stacked and their Bs in blocks, of the sum of their ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lora.adapters.saved_factors import SavedFactors
from lora.forward.model.architecture import Architecture
from lora.forward.model.layer_spec import Attention, GatedFeedForward, LayerSpec
from lora.shaders.errors import InputError

# Module and its parts, in the order of their rows.
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def as_named_in(
    architecture: Architecture, source: Path, modules: Mapping[str, SavedFactors]
) -> dict[str, SavedFactors]:
    """An adapter's factors under the names that the model has for its modules.

    What the model doesn't know under any name stays as it is, for others to refuse.

    Args:
        architecture: of the model.
        source: of the adapter, for messages.
        modules: by PEFT's module path.

    Raises:
        InputError: a fused B has other rows than the model's parts together.
    """
    found = dict(modules)
    for layer, spec in enumerate(architecture.layers):
        in_layer = {m.module for group in spec.groups.values() for m in group}
        within = f"model.layers.{layer}."
        for fused, parts in FUSED.items():
            whole = within + fused
            known = [name.rpartition(".")[2] in in_layer for name in parts]
            has_whole = fused.rpartition(".")[2] in in_layer
            if whole in found and not has_whole and all(known):
                found |= _apart(source, whole, found.pop(whole), within, parts, _rows(spec, parts))
            elif has_whole and not any(known):
                given = {part: found.pop(within + part, None) for part in parts}
                if any(given.values()) and whole in found:
                    raise InputError(f"{source}: adapts {whole}, and its parts as well.")
                if any(given.values()):
                    found[whole] = _together(source, whole, given, _rows_of_parts(spec, fused))
    return found


def _rows(spec: LayerSpec, parts: tuple[str, ...]) -> list[int]:
    by_module = {m.module: m for group in spec.groups.values() for m in group}
    return [by_module[part.rpartition(".")[2]].out_size(spec) for part in parts]


def _rows_of_parts(spec: LayerSpec, fused: str) -> list[int]:
    mixer, feed_forward = spec.mixer, spec.feed_forward
    if fused == "mlp.gate_up_proj":
        assert isinstance(feed_forward, GatedFeedForward)  # others have no such module
        return [feed_forward.gate_up_size // 2] * 2
    assert isinstance(mixer, Attention)
    return [mixer.query_size, mixer.kv_size, mixer.kv_size]


def _apart(
    source: Path,
    whole: str,
    factors: SavedFactors,
    within: str,
    parts: tuple[str, ...],
    rows: list[int],
) -> dict[str, SavedFactors]:
    if len(factors.b) != sum(rows):
        raise InputError(
            f"{source}: B of {whole} has {len(factors.b)} rows; this model's {', '.join(parts)} "
            f"have {sum(rows)}. The adapter was made for another one."
        )
    ends = np.cumsum(rows)[:-1]
    magnitudes: list[np.ndarray | None] = [None] * len(parts)
    if factors.magnitude is not None:
        magnitudes = list(np.split(factors.magnitude, ends))
    return {
        within + part: SavedFactors(factors.a, b, factors.scale, magnitude)
        for part, b, magnitude in zip(parts, np.split(factors.b, ends), magnitudes, strict=True)
    }


def _together(
    source: Path, whole: str, given: Mapping[str, SavedFactors | None], rows: list[int]
) -> SavedFactors:
    there = [one for one in given.values() if one is not None]
    if len({one.a.shape[1] for one in there}) != 1:
        raise InputError(f"{source}: the parts of {whole} have As of different widths.")
    scales = {one.scale for one in there}
    scale = next(iter(scales)) if len(scales) == 1 else 1.0
    b = np.zeros((sum(rows), sum(one.rank for one in there)), np.float32)
    magnitude = np.full(len(b), np.nan, np.float32)
    row = column = 0
    for (part, one), n_rows in zip(given.items(), rows, strict=True):
        if one is not None:
            if len(one.b) != n_rows:
                raise InputError(
                    f"{source}: B of {part} beside {whole} has {len(one.b)} rows; this model's "
                    f"has {n_rows}. The adapter was made for another one."
                )
            factor = 1.0 if len(scales) == 1 else one.scale
            b[row : row + n_rows, column : column + one.rank] = one.b * np.float32(factor)
            if one.magnitude is not None:
                magnitude[row : row + n_rows] = one.magnitude
            column += one.rank
        row += n_rows
    has_lengths = any(one.magnitude is not None for one in there)
    a = np.concatenate([one.a for one in there])
    return SavedFactors(a, b, scale, magnitude if has_lengths else None)
