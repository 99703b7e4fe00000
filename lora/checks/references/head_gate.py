"""The output gate of attention and its gradient."""

import numpy as np


def _gates(raw: np.ndarray, width: int, head_size: int) -> np.ndarray:
    """σ of the second half of each head, [rows, width]."""
    heads = raw[:, : 2 * width].astype(np.float64).reshape(len(raw), -1, 2, head_size)
    return 1 / (1 + np.exp(-heads[:, :, 1].reshape(len(raw), width)))


def head_gate_reference(raw: np.ndarray, x: np.ndarray, head_size: int) -> np.ndarray:
    """[rows, width] of raw [rows, 2 · width or more] and x [rows, width]."""
    return x * _gates(raw, x.shape[1], head_size)


def head_gate_backward_reference(
    raw: np.ndarray, x: np.ndarray, head_size: int, d_y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """d_x, and d_raw with zeros but for the gates."""
    s = _gates(raw, x.shape[1], head_size)
    d_raw = np.zeros(raw.shape)
    heads = d_raw[:, : 2 * x.shape[1]].reshape(len(raw), -1, 2, head_size)
    heads[:, :, 1] = (d_y * x * s * (1 - s)).reshape(len(raw), -1, head_size)
    d_raw[:, : 2 * x.shape[1]] = heads.reshape(len(raw), -1)
    return d_y * s, d_raw
