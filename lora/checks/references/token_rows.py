"""Rows of the embedding, and of a head that is the embedding, that are trained themselves."""

import numpy as np


def replaced(w: np.ndarray, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """W [vocab, width] with rows [n, width] in the places `ids` [n]."""
    found = w.astype(np.float64)
    found[ids] = rows
    return found


def token_logits_reference(
    x: np.ndarray, w: np.ndarray, rows: np.ndarray, ids: np.ndarray, softcap: float | None = None
) -> np.ndarray:
    """The (capped) logits [m, vocab] of x [m, width]."""
    logits = x.astype(np.float64) @ replaced(w, rows, ids).T
    return logits if softcap is None else softcap * np.tanh(logits / softcap)


def embedding_gradient_reference(
    d_x: np.ndarray, tokens: np.ndarray, ids: np.ndarray, scale: float = 1.0
) -> np.ndarray:
    """To rows [n, width]: of each token the sum of scale · d_x [m, width] where it stands."""
    return np.stack([scale * d_x[tokens == token].astype(np.float64).sum(axis=0) for token in ids])


def logits_gradients_reference(
    d_logits: np.ndarray, x: np.ndarray, w: np.ndarray, rows: np.ndarray, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """To x [m, width] and to rows [n, width], of the gradient to logits before a cap."""
    d = d_logits.astype(np.float64)
    return d @ replaced(w, rows, ids), d[:, ids].T @ x.astype(np.float64)
