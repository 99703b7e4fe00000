"""LoRA on the embedding."""

import numpy as np


def embedding_lora_reference(
    tokens: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float
) -> np.ndarray:
    """What is added: scale · A[tokens] · B, of A [vocab, rank] and B [rank, width]."""
    found: np.ndarray = scale * a[tokens].astype(np.float64) @ b.astype(np.float64)
    return found


def embedding_lora_gradients_reference(
    tokens: np.ndarray, a: np.ndarray, b: np.ndarray, d_x: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """To A and to B, of the gradient to the embeddings d_x [rows, width]."""
    d = scale * d_x.astype(np.float64)
    d_a = np.zeros(a.shape)
    np.add.at(d_a, tokens, d @ b.astype(np.float64).T)
    return d_a, a[tokens].astype(np.float64).T @ d
