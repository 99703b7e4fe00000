"""The gated activation and its gradient."""

import numpy as np


def gate_reference(g: np.ndarray, name: str) -> np.ndarray:
    """silu or gelu_tanh of each number."""
    if name == "silu":
        return g / (1 + np.exp(-g))
    return 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))


def gate_slope_reference(g: np.ndarray, name: str) -> np.ndarray:
    """The derivative of the same."""
    if name == "silu":
        s = 1 / (1 + np.exp(-g))
        return s * (1 + g * (1 - s))
    t = np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))
    inner = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * g**2)
    return 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * inner


def swiglu_backward_reference(gate_up: np.ndarray, d_y: np.ndarray, name: str) -> np.ndarray:
    """The gradient to gate and up, side by side [rows, 2 · width]."""
    width = d_y.shape[1]
    gate, up = gate_up[:, :width].astype(np.float64), gate_up[:, width:].astype(np.float64)
    d_gate = d_y * up * gate_slope_reference(gate, name)
    return np.concatenate([d_gate, d_y * gate_reference(gate, name)], axis=1)
