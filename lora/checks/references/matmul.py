"""Products with a matrix and a low-rank part, and what f32 sums may miss."""

import numpy as np


def matmul_reference(
    x: np.ndarray, w: np.ndarray, z: np.ndarray, b: np.ndarray,
    ranges: list[tuple[int, int]], rank: int, scale: float,
) -> np.ndarray:  # fmt: skip
    """y = x Wᵀ + scale · z_g B_gᵀ on each member's columns, in float64."""
    y = x.astype(np.float64) @ w.astype(np.float64).T
    row = 0
    for g, (start, stop) in enumerate(ranges):
        b_g = b[row : row + stop - start].astype(np.float64)
        y[:, start:stop] += scale * z[:, g * rank : (g + 1) * rank].astype(np.float64) @ b_g.T
        row += stop - start
    return y


def product_reference(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """y = x Wᵀ in float64."""
    return x.astype(np.float64) @ w.astype(np.float64).T


def product_gradient_reference(d_y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """d_x = d_y W in float64."""
    return d_y.astype(np.float64) @ w.astype(np.float64)


def error_bound(magnitude: np.ndarray, terms: int) -> np.ndarray:
    """Each of n additions rounds the sum so far by at most 2^-24 of Σ |x · w|; their signs are
    random, so that they grow as sqrt(n)."""
    return 2 * np.sqrt(terms) * 2.0**-24 * magnitude
