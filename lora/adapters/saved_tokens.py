"""Rows of the embedding as an adapter's file has them, and how they come into a layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora.forward.model.adapter import AdapterLayout
from lora.shaders.errors import InputError


@dataclass(frozen=True)
class SavedTokens:
    """Rows that stand in place of the base's.

    Attributes:
        ids: of the tokens, each once.
        rows: f32 [tokens, hidden_size].
    """

    ids: tuple[int, ...]
    rows: np.ndarray


def put_tokens(
    source: Path, saved: SavedTokens | None, layout: AdapterLayout, flat: np.ndarray
) -> None:
    """Writes an adapter's rows into its place in a flat array, whatever their order in the file.

    Args:
        source: where the adapter came from, for messages.

    Raises:
        InputError: it has rows of other tokens than the layout, or of another width.
    """
    there = () if saved is None else saved.ids
    for ids, others, what in (
        (layout.tokens, there, "has no row of the token {}, which adapter.trainable_tokens names"),
        (there, layout.tokens, "has a row of the token {}, which adapter.trainable_tokens lacks"),
    ):
        missing = sorted(set(ids) - set(others))
        if missing:
            raise InputError(f"{source}: {what.format(missing[0])} ({len(missing)} such).")
    if saved is None:
        return
    width = layout.architecture.hidden_size
    if saved.rows.shape[1] != width:
        raise InputError(
            f"{source}: its rows of tokens have {saved.rows.shape[1]} columns, and this model's "
            f"embedding has {width}. The adapter was made for another one."
        )
    places = [saved.ids.index(token) for token in layout.tokens]
    layout.trained_tokens(flat)[:] = saved.rows[places]
