"""What tests of the gated activation and of its gradient share."""

import numpy as np

ACTIVATIONS = ["silu", "gelu_tanh"]
SHAPES = [
    (1, 1, 4, "silu"),
    (3, 2, 36, "gelu_tanh"),
    (67, 67, 100, "gelu_tanh"),
    (130, 129, 576, "silu"),
]  # rows, those in use, width


def make_inputs(rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """gate_up [rows, 2 · width] and d_y [rows, width]."""
    rng = np.random.default_rng(width)
    gate_up = 3 * rng.normal(size=(rows, 2 * width)).astype(np.float32)
    gate_up[0, 0], gate_up[-1, 1] = -80.0, 80.0  # far into both tails
    return gate_up, rng.normal(size=(rows, width)).astype(np.float32)
