"""The low-rank part of a product and its gradients."""

from collections.abc import Sequence

import numpy as np

Ranges = Sequence[tuple[int, int]]  # first column and the one past the last


def low_rank_reference(
    x: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    ranges: Ranges,
    scale: float,
    out_features: int,
) -> np.ndarray:
    """The low-rank part of y: scale · (x · A_gᵀ) · B_gᵀ in each member's columns.

    Args:
        x: [rows, in_features].
        a: [members · rank, in_features], the A of each adapted member.
        b: [columns of all members, rank], the B of each.
        ranges: each member's columns of y [rows, out_features].
    """
    y, rank = np.zeros((len(x), out_features)), b.shape[1]
    b_row = 0
    for g, (start, stop) in enumerate(ranges):
        z = x @ a[g * rank : (g + 1) * rank].T
        y[:, start:stop] = scale * z @ b[b_row : b_row + stop - start].T
        b_row += stop - start
    return y


def gradients_reference(
    x: np.ndarray, d_y: np.ndarray, a: np.ndarray, b: np.ndarray, ranges: Ranges, scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """d_z [rows, members · rank], d_A and d_B for the loss Σ d_y · y, as above, in float64."""
    x, d_y, a, b = (v.astype(np.float64) for v in (x, d_y, a, b))
    rank = b.shape[1]
    d_z, d_b = np.zeros((len(x), len(ranges) * rank)), np.zeros_like(b)
    b_row = 0
    for g, (start, stop) in enumerate(ranges):
        low = slice(g * rank, (g + 1) * rank)
        rows = slice(b_row, b_row + stop - start)
        d_z[:, low] = scale * d_y[:, start:stop] @ b[rows]
        d_b[rows] = scale * d_y[:, start:stop].T @ (x @ a[low].T)
        b_row += stop - start
    return d_z, d_z.T @ x, d_b
