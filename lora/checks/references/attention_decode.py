"""Attention of rows to a cache of keys and values."""

import numpy as np


def attention_decode_reference(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    positions: np.ndarray,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> np.ndarray:
    """softmax(scale · q kᵀ) v in float64: q [rows, heads, d], keys, values [room, kv heads, d]."""
    rows, n_heads, head_size = q.shape
    shared = n_heads // keys.shape[1]
    out = np.zeros((rows, n_heads, head_size))
    for row, position in enumerate(positions):
        first = 0 if window is None else max(0, int(position) + 1 - window)
        for head in range(n_heads):
            k = keys[first : position + 1, head // shared].astype(np.float64)
            v = values[first : position + 1, head // shared].astype(np.float64)
            scores = k @ q[row, head] * scale
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ v / weights.sum()
    return out


def prepared_heads(
    head: np.ndarray,
    weight: np.ndarray | None,
    angles: np.ndarray,
    interleaved: bool,
    epsilon: float,
) -> np.ndarray:
    """Heads [n, head_size] normed and turned by one position's angles [half], in float64."""
    x = head.astype(np.float64)
    if weight is not None:
        x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + epsilon) * weight
    half = len(angles)
    pairs = np.arange(half)
    first, second = (2 * pairs, 2 * pairs + 1) if interleaved else (pairs, pairs + half)
    turned = x.copy()
    turned[:, first] = x[:, first] * np.cos(angles) - x[:, second] * np.sin(angles)
    turned[:, second] = x[:, second] * np.cos(angles) + x[:, first] * np.sin(angles)
    return turned
