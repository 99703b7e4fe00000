"""Products of one row: the norm before it, gate and up."""

import numpy as np


def normed_row(x: np.ndarray, weight: np.ndarray | None, epsilon: float) -> np.ndarray:
    """RMSNorm in float64; x itself without a weight."""
    exact = x.astype(np.float64)
    if weight is None:
        return exact
    return exact / np.sqrt(np.mean(exact**2) + epsilon) * weight


def gated_reference(
    v: np.ndarray, w: np.ndarray, bias: np.ndarray, a: np.ndarray, b: np.ndarray,
    adapted: tuple[int, ...], scale: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Gate and up of one row, in float64.

    Args:
        v: [1, in_features], normed.
        w: [2 · n, in_features], the gate's rows and those of up.
        a: [members · rank, in_features]; b [members · n, rank].
        adapted: which of gate (0) and up (1) have factors.

    Returns:
        gate and up [1, n]; the sum of the sizes of each one's terms [2 · n].
    """
    half, rank = len(w) // 2, b.shape[1]
    product, magnitude = v @ w.T + bias, (np.abs(v) @ np.abs(w).T)[0] + np.abs(bias)
    for index, member in enumerate(adapted):
        low = v @ a[index * rank : (index + 1) * rank].astype(np.float64).T
        factor = b[index * half : (index + 1) * half].astype(np.float64)
        columns_of = slice(member * half, (member + 1) * half)
        product[:, columns_of] += scale * low @ factor.T
        size = np.abs(v) @ np.abs(a[index * rank : (index + 1) * rank]).T
        magnitude[columns_of] += (scale * size @ np.abs(factor).T)[0]
    return product[:, :half], product[:, half:], magnitude
