"""Gradient clipping and AdamW."""

import numpy as np

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def clip_reference(gradient: np.ndarray, max_norm: float | None) -> tuple[float, float]:
    """The norm before clipping, and the factor of torch.nn.utils.clip_grad_norm_."""
    norm = float(np.sqrt((gradient.astype(np.float64) ** 2).sum()))
    return norm, 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))


class AdamWReference:
    """Loshchilov & Hutter 2019, algorithm 2, in float64."""

    def __init__(self, parameters: np.ndarray, weight_decay: float) -> None:
        self.p = parameters.astype(np.float64)
        self.m = np.zeros_like(self.p)
        self.v = np.zeros_like(self.p)
        self.t = 0
        self.weight_decay = weight_decay

    def step(self, gradient: np.ndarray, learning_rate: float) -> None:
        """One step with a gradient as large as the parameters."""
        g = gradient.astype(np.float64)
        self.t += 1
        self.p *= 1 - learning_rate * self.weight_decay
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * g * g
        m_hat = self.m / (1 - BETAS[0] ** self.t)
        v_hat = self.v / (1 - BETAS[1] ** self.t)
        self.p -= learning_rate * m_hat / (np.sqrt(v_hat) + EPSILON)
