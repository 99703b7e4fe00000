"""What tokens have for every layer, its gate, and the gate's gradient."""

import numpy as np

from lora.checks.references.rmsnorm import rmsnorm_reference
from lora.checks.references.swiglu import gate_reference, gate_slope_reference


def per_layer_inputs_reference(
    projected: np.ndarray, weight: np.ndarray, epsilon: float, table: np.ndarray, scale: float
) -> np.ndarray:
    """(norm(projected) + scale · table) / √2, each [rows, layers · size], the norm by layer."""
    shape = (len(projected), -1, len(weight))
    parts = [rmsnorm_reference(row, weight, epsilon) for row in projected.reshape(shape)]
    normed = np.stack(parts).reshape(projected.shape)
    return (normed + scale * table.astype(np.float64)) / np.sqrt(2.0)


def per_layer_gate_reference(
    gate: np.ndarray, inputs: np.ndarray, first: int, name: str
) -> np.ndarray:
    """activation(gate) · inputs[:, first : first + size] for a gate [rows, size]."""
    own = inputs[:, first : first + gate.shape[1]].astype(np.float64)
    return gate_reference(gate.astype(np.float64), name) * own


def per_layer_gate_backward_reference(
    gate: np.ndarray, inputs: np.ndarray, first: int, name: str, d_y: np.ndarray
) -> np.ndarray:
    """d_gate [rows, size] for the loss Σ d_y · y."""
    own = inputs[:, first : first + gate.shape[1]].astype(np.float64)
    return d_y * gate_slope_reference(gate.astype(np.float64), name) * own
