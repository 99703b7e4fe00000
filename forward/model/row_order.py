"""The order of rows in Hugging Face's files, and in GGUFs that have them in another."""

from __future__ import annotations

import numpy as np


def permute_rows_to_gguf(array: np.ndarray, n_heads: int) -> np.ndarray:
    """Puts rows in the Hugging Face order of q and k into the order of a llama GGUF.

    Within a head of size d, GGUF row 2j + h is Hugging Face row h·d/2 + j, h in {0, 1}: rope
    then turns neighbours instead of halves (llama.cpp, convert_hf_to_gguf.py, `permute`).

    Args:
        array: [n_heads · d, ...]: a weight, a bias, or the B of an adapter.
        n_heads: n_heads for q, n_kv_heads for k.

    Returns:
        A new array of the same shape.
    """
    halves = array.reshape(n_heads, 2, _half_head(array, n_heads), *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def permute_rows_to_hf(array: np.ndarray, n_heads: int) -> np.ndarray:
    """Undoes `permute_rows_to_gguf`: from the order of a llama GGUF to Hugging Face's.

    Args:
        array: [n_heads · d, ...].
        n_heads: n_heads for q, n_kv_heads for k.

    Returns:
        A new array of the same shape.
    """
    pairs = array.reshape(n_heads, _half_head(array, n_heads), 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _half_head(array: np.ndarray, n_heads: int) -> int:
    if array.shape[0] % (2 * n_heads):
        raise ValueError(f"{array.shape[0]} rows are not {n_heads} heads of an even size")
    return array.shape[0] // (2 * n_heads)


def to_gguf(array: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """Rows in PEFT's order put into the GGUF's: row i becomes what order[i] was."""
    return array if order is None else np.ascontiguousarray(array[order])


def to_hf(array: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """Undoes `to_gguf`."""
    if order is None:
        return array
    found = np.empty_like(array)
    found[order] = array
    return found
