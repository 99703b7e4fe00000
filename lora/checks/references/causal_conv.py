"""Causal convolutions of columns, and their gradient, row by row."""

import numpy as np


def _source(x: np.ndarray, width: int, gated: bool) -> np.ndarray:
    return x[:, :width] * x[:, 2 * width : 3 * width] if gated else x[:, :width]


def _convolved(
    s: np.ndarray, weight: np.ndarray, starts: np.ndarray, before: np.ndarray | None
) -> np.ndarray:
    """Σ_j weight[j] · s[m − taps + 1 + j]; `before` are the rows before the first."""
    taps = len(weight)
    c = np.zeros(s.shape)
    for row, first in enumerate(starts):
        for j in range(taps):
            other = row - (taps - 1) + j
            if other >= first:
                c[row] += weight[j] * s[other]
            elif other < 0 and before is not None:
                c[row] += weight[j] * before[other]
    return c


def causal_conv_reference(
    x: np.ndarray, weight: np.ndarray, starts: np.ndarray, gated: bool,
    before: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """y [rows, width] of x [rows, any width], weight [taps, width], each row's example's start."""
    width = weight.shape[1]
    c = _convolved(_source(x, width, gated), weight, starts, before)
    return x[:, width : 2 * width] * c if gated else c / (1 + np.exp(-c))


def conv_state_reference(
    x: np.ndarray, taps: int, width: int, gated: bool, before: np.ndarray | None
) -> np.ndarray:
    """[taps − 1, width], what was convolved of the last rows."""
    earlier = np.zeros((taps - 1, width)) if before is None else before
    return np.concatenate([earlier, _source(x, width, gated)])[-(taps - 1) :]


def causal_conv_backward_reference(
    x: np.ndarray, weight: np.ndarray, starts: np.ndarray, gated: bool, d_y: np.ndarray
) -> np.ndarray:
    """d_x shaped as x for the loss Σ d_y · y; zero in columns that aren't read."""
    taps, width = weight.shape
    s = _source(x, width, gated)
    c = _convolved(s, weight, starts, None)
    if gated:
        d_c = d_y * x[:, width : 2 * width]
    else:
        sigmoid = 1 / (1 + np.exp(-c))
        d_c = d_y * sigmoid * (1 + c * (1 - sigmoid))
    d_s = np.zeros(s.shape)
    for row, first in enumerate(starts):
        for j in range(taps):
            other = row - (taps - 1) + j
            if other >= first:
                d_s[other] += weight[j] * d_c[row]
    d_x = np.zeros(x.shape)
    if not gated:
        d_x[:, :width] = d_s
        return d_x
    d_x[:, :width] = d_s * x[:, 2 * width : 3 * width]
    d_x[:, width : 2 * width] = d_y * c
    d_x[:, 2 * width : 3 * width] = d_s * x[:, :width]
    return d_x
