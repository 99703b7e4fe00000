"""The gradient of rows picked by index."""

import numpy as np


def gather_backward_reference(d_y: np.ndarray, indices: np.ndarray, rows: int) -> np.ndarray:
    """Each row gets the sum of the gradients of the places it was picked for."""
    d_x = np.zeros((rows, d_y.shape[1]))
    np.add.at(d_x, indices, d_y)
    return d_x
