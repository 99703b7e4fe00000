"""The norm and rotation of query and key heads, and its gradient."""

from dataclasses import dataclass

import numpy as np

from lora.checks.references.rope import rope_backward_reference, rope_reference


@dataclass(frozen=True)
class HeadLayout:
    """qkv [rows, (n_heads + 2 · n_kv_heads) · head_size], and how its heads turn."""

    n_heads: int
    n_kv_heads: int
    head_size: int
    dimensions: int  # of a head, that turn
    interleaved: bool
    base: float = 10000.0
    epsilon: float = 1e-6

    @property
    def width(self) -> int:
        """Columns of qkv."""
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_size


def head_norm_rope_reference(
    qkv: np.ndarray,
    q_weight: np.ndarray,
    k_weight: np.ndarray,
    positions: np.ndarray,
    layout: HeadLayout,
) -> np.ndarray:
    """Query and key heads normed, times their weight [head_size], and turned; v as it is."""
    n_heads, n_kv_heads = layout.n_heads, layout.n_kv_heads
    heads = qkv.astype(np.float64).reshape(len(qkv), n_heads + 2 * n_kv_heads, -1).copy()
    rstd = 1 / np.sqrt((heads * heads).mean(axis=2, keepdims=True) + layout.epsilon)
    k, v = slice(n_heads, n_heads + n_kv_heads), slice(n_heads + n_kv_heads, None)
    normed = heads * rstd
    normed[:, :n_heads] *= q_weight
    normed[:, k] *= k_weight
    normed[:, v] = heads[:, v]
    return rope_reference(
        normed.reshape(qkv.shape), positions, layout.base, layout.dimensions, n_heads + n_kv_heads,
        layout.head_size, layout.interleaved,
    )  # fmt: skip


def head_norm_rope_backward_reference(
    qkv: np.ndarray, q_weight: np.ndarray, k_weight: np.ndarray, d_y: np.ndarray,
    positions: np.ndarray, layout: HeadLayout,
) -> np.ndarray:  # fmt: skip
    """d_qkv of the same for the loss Σ d_y · y."""
    n_heads, n_normed = layout.n_heads, layout.n_heads + layout.n_kv_heads
    shape = (len(qkv), n_normed + layout.n_kv_heads, layout.head_size)
    x = qkv.astype(np.float64).reshape(shape)
    d = rope_backward_reference(
        d_y,
        positions,
        layout.base,
        layout.dimensions,
        n_normed,
        layout.head_size,
        layout.interleaved,
    ).reshape(shape)
    for head in range(n_normed):
        g = d[:, head] * (q_weight if head < n_heads else k_weight)
        x_h = x[:, head]
        rstd = 1 / np.sqrt((x_h * x_h).mean(axis=1, keepdims=True) + layout.epsilon)
        d[:, head] = rstd * (g - x_h * rstd**2 * (g * x_h).mean(axis=1, keepdims=True))
    return d.reshape(qkv.shape)
