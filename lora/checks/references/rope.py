"""The rotary embedding and its gradient."""

import numpy as np


def rope_reference(
    qkv: np.ndarray, positions: np.ndarray, base: float, dimensions: int,
    n_rotated_heads: int, head_size: int, interleaved: bool, sign: int = 1,
) -> np.ndarray:  # fmt: skip
    """qkv [rows, columns] whose first heads are turned by the angles of `positions` [rows]."""
    out = qkv.astype(np.float64).copy()
    for j in range(dimensions // 2):
        angle = sign * positions * base ** (-2 * j / dimensions)
        for head in range(n_rotated_heads):
            first = head * head_size
            a = first + (2 * j if interleaved else j)
            b = first + (2 * j + 1 if interleaved else j + dimensions // 2)
            out[:, a] = qkv[:, a] * np.cos(angle) - qkv[:, b] * np.sin(angle)
            out[:, b] = qkv[:, b] * np.cos(angle) + qkv[:, a] * np.sin(angle)
    return out


def rope_backward_reference(
    d_qkv: np.ndarray, positions: np.ndarray, base: float, dimensions: int,
    n_rotated_heads: int, head_size: int, interleaved: bool,
) -> np.ndarray:  # fmt: skip
    """The transpose of the rotation, pair by pair: [[cos, sin], [−sin, cos]]."""
    out = d_qkv.astype(np.float64).copy()
    for j in range(dimensions // 2):
        cos, sin = (f(positions * base ** (-2 * j / dimensions)) for f in (np.cos, np.sin))
        for head in range(n_rotated_heads):
            first = head * head_size
            a = first + (2 * j if interleaved else j)
            b = first + (2 * j + 1 if interleaved else j + dimensions // 2)
            out[:, a] = cos * d_qkv[:, a] + sin * d_qkv[:, b]
            out[:, b] = -sin * d_qkv[:, a] + cos * d_qkv[:, b]
    return out
