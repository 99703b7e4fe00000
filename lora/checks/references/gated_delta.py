"""The gated delta rule row by row, as it is defined, and its gradient (Yang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DeltaInputs:
    """What goes in, of all rows.

    Attributes:
        q, k: [rows, key heads, n].
        v: [rows, heads, n].
        g, beta: [rows, heads].
        starts: the first row of each row's example.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    g: np.ndarray
    beta: np.ndarray
    starts: np.ndarray

    def key_head(self, head: int) -> int:
        """The key head that a value head shares."""
        return head % self.k.shape[1]


def gated_delta_reference(
    x: DeltaInputs, before: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """o [rows, heads, n], and the states [heads, n, n] after the last row.

    Args:
        x: what goes in.
        before: the states before the first row.
    """
    rows, heads, n = x.v.shape
    out, states = np.zeros(x.v.shape), np.zeros((heads, n, n))
    for head in range(heads):
        key = x.key_head(head)
        state = np.zeros((n, n)) if before is None else before[head].astype(np.float64)
        for t in range(rows):
            if t == x.starts[t] and (t > 0 or before is None):
                state = np.zeros((n, n))
            state = state * np.exp(x.g[t, head])
            d = x.beta[t, head] * (x.v[t, head] - state.T @ x.k[t, key])
            state = state + np.outer(x.k[t, key], d)
            out[t, head] = state.T @ x.q[t, key]
        states[head] = state
    return out, states


def gated_delta_backward_reference(x: DeltaInputs, d_o: np.ndarray) -> DeltaInputs:
    """Gradients of Σ d_o · o, q's and k's of each value head by itself [rows, heads, n]."""
    rows, heads, n = x.v.shape
    vectors, numbers = np.zeros((3, *x.v.shape)), np.zeros((2, *x.g.shape))
    d = DeltaInputs(vectors[0], vectors[1], vectors[2], numbers[0], numbers[1], x.starts)
    for head in range(heads):
        key, kept = x.key_head(head), []
        state = np.zeros((n, n))
        for t in range(rows):
            if t == x.starts[t]:
                state = np.zeros((n, n))
            decayed = state * np.exp(x.g[t, head])
            change = x.beta[t, head] * (x.v[t, head] - decayed.T @ x.k[t, key])
            state = decayed + np.outer(x.k[t, key], change)
            kept.append((decayed, change, state))
        gradient = np.zeros((n, n))
        for t in reversed(range(rows)):
            decayed, change, state = kept[t]
            k, beta = x.k[t, key], x.beta[t, head]
            d.q[t, head] = state @ d_o[t, head]
            gradient = gradient + np.outer(x.q[t, key], d_o[t, head])
            d_change = gradient.T @ k
            d.v[t, head] = beta * d_change
            d.beta[t, head] = d_change @ (x.v[t, head] - decayed.T @ k)
            d.k[t, head] = gradient @ change - beta * (decayed @ d_change)
            d_decayed = gradient - beta * np.outer(k, d_change)
            d.g[t, head] = (d_decayed * decayed).sum()
            gradient = np.exp(x.g[t, head]) * d_decayed
            if t == x.starts[t]:
                gradient = np.zeros((n, n))
    return d


def delta_gates_reference(
    b: np.ndarray, alpha: np.ndarray, a: np.ndarray, dt: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """g and beta [rows, heads]."""
    return a * np.logaddexp(0.0, alpha + dt), 1 / (1 + np.exp(-b))


def delta_gates_backward_reference(
    b: np.ndarray, alpha: np.ndarray, a: np.ndarray, dt: np.ndarray, d_gates: np.ndarray
) -> np.ndarray:
    """d_b and d_alpha side by side, [rows, 2 · heads], of d_g and d_beta side by side."""
    d_g, d_beta = np.split(d_gates, 2, axis=1)
    beta = 1 / (1 + np.exp(-b))
    return np.concatenate(
        [d_beta * beta * (1 - beta), d_g * a / (1 + np.exp(-(alpha + dt)))], axis=1
    )
