"""Attention within examples that lie end to end, and its gradient."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Shape:
    """The options of one attention, by the names of its keywords."""

    n_heads: int
    n_kv_heads: int
    head_size: int
    scale: float
    window: int | None = None
    softcap: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of the kernels' functions."""
        return asdict(self)

    @property
    def width(self) -> int:
        """Columns of qkv."""
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_size


def segments_of(lengths: list[int]) -> np.ndarray:
    """[rows, 2]: for each row the first row of its example and the row past its end."""
    ends = np.cumsum(lengths)
    return np.concatenate(
        [np.tile([end - n, end], (n, 1)) for n, end in zip(lengths, ends, strict=True)]
    ).astype(np.uint32)


def split_heads(qkv: np.ndarray, shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [n_heads, rows, head_size], k and v [n_kv_heads, rows, head_size]."""
    heads = qkv.reshape(len(qkv), -1, shape.head_size).swapaxes(0, 1)
    n, m = shape.n_heads, shape.n_kv_heads
    return heads[:n], heads[n : n + m], heads[n + m :]


def sees(segments: np.ndarray, shape: Shape) -> np.ndarray:
    """[rows, rows]: which rows j each row i attends to."""
    i = np.arange(len(segments))[:, None]
    j = np.arange(len(segments))[None, :]
    seen = (j >= segments[:, :1]) & (j <= i)
    return seen if shape.window is None else seen & (i - j < shape.window)


def attention_reference(
    qkv: np.ndarray, segments: np.ndarray, shape: Shape
) -> tuple[np.ndarray, np.ndarray]:
    """out [rows, n_heads · head_size] and the scores' log-sum-exp [rows, n_heads]."""
    q, k, v = split_heads(qkv.astype(np.float64), shape)
    seen = sees(segments, shape)
    out = np.zeros((len(qkv), shape.n_heads, shape.head_size))
    lse = np.zeros((len(qkv), shape.n_heads))
    for h in range(shape.n_heads):
        kv = h // (shape.n_heads // shape.n_kv_heads)
        s = shape.scale * q[h] @ k[kv].T
        if shape.softcap is not None:
            s = shape.softcap * np.tanh(s / shape.softcap)
        s = np.where(seen, s, -np.inf)
        highest = s.max(axis=1)
        lse[:, h] = highest + np.log(np.exp(s - highest[:, None]).sum(axis=1))
        out[:, h] = np.exp(s - lse[:, h, None]) @ v[kv]
    return out.reshape(len(qkv), -1), lse


def attention_backward_reference(
    qkv: np.ndarray, d_out: np.ndarray, segments: np.ndarray, shape: Shape
) -> np.ndarray:
    """d_qkv for the loss Σ d_out · out."""
    q, k, v = split_heads(qkv.astype(np.float64), shape)
    d_y = d_out.astype(np.float64).reshape(len(qkv), shape.n_heads, shape.head_size)
    seen = sees(segments, shape)
    d_q, d_k, d_v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for h in range(shape.n_heads):
        kv = h // (shape.n_heads // shape.n_kv_heads)
        s = shape.scale * q[h] @ k[kv].T
        slope = np.ones_like(s)
        if shape.softcap is not None:
            slope = 1 - np.tanh(s / shape.softcap) ** 2
            s = shape.softcap * np.tanh(s / shape.softcap)
        s = np.where(seen, s, -np.inf)
        p = np.exp(s - s.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        d_p = d_y[:, h] @ v[kv].T
        d_s = p * (d_p - (p * d_p).sum(axis=1, keepdims=True)) * slope
        d_q[h] = shape.scale * d_s @ k[kv]
        d_k[kv] += shape.scale * d_s.T @ q[h]
        d_v[kv] += p.T @ d_y[:, h]
    return np.concatenate([d_q, d_k, d_v]).swapaxes(0, 1).reshape(len(qkv), -1)
