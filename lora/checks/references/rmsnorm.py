"""RMSNorm and its gradient."""

import numpy as np


def rmsnorm_reference(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """Each row of x [rows, width] over its root mean square, times weight [width]."""
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + epsilon) * weight.astype(np.float64)


def rmsnorm_backward_reference(
    x: np.ndarray, weight: np.ndarray, d_y: np.ndarray, epsilon: float
) -> np.ndarray:
    """d_x [rows, width] for the loss Σ d_y · y."""
    x, g = x.astype(np.float64), d_y.astype(np.float64) * weight
    rstd = 1 / np.sqrt((x * x).mean(axis=1, keepdims=True) + epsilon)
    return rstd * (g - x * rstd**2 * (g * x).mean(axis=1, keepdims=True))


def scaled_halves(rows: np.ndarray) -> np.ndarray:
    """f32 [rows, width] as tiles of f16 hold it: `scaled_rows`, rounded to the nearest."""
    with np.errstate(invalid="ignore"):
        return scaled_rows(rows).astype(np.float16)


def scaled_rows(rows: np.ndarray) -> np.ndarray:
    """f32 [rows, width] times the powers of two that bring each row's largest to 2^4 … 2^5, f64."""
    largest = np.abs(rows).max(axis=1).astype(np.float32).view(np.uint32)
    exponents = np.clip(131 - (largest >> 23).astype(np.int32), -126, 126)
    return np.ldexp(rows.astype(np.float64), exponents[:, None])
