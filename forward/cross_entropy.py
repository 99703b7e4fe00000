"""Softmax cross-entropy on a chunk of logits; its gradient overwrites the logits at once."""

from __future__ import annotations

from forward.activations import check_shape, extent_of
from shaders.program import Program
from shaders.tensor import Tensor


def cross_entropy(
    program: Program,
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    correct: Tensor,
    step: Tensor | None,
    *,
    vocab_size: int | None = None,
    softcap: float | None = None,
) -> None:
    """Appends the losses of a chunk and, where `step` is given, the gradient to its logits.

    Args:
        logits: [chunk, vocab_size or more]; overwritten by the gradient.
        labels: u32 [chunk], each a token id (rows without a target never come here).
        losses: [chunk], written: logsumexp(logits) − logits[label].
        correct: [chunk], written: 1 where the label is the argmax, else 0.
        step: a uniform whose first word is the f32 that every loss is weighted by (one over the
            trained tokens of the optimizer step); None for no gradient.
        vocab_size: columns that count; those after them (padding, zero) stay as they are. By
            default all.
        softcap: the logits are softcap · tanh(raw / softcap), and the gradient is the one to the
            raw ones; None for no cap.
    """
    extent = extent_of(logits)
    rows, stride = logits.shape
    n_columns = stride if vocab_size is None else vocab_size
    if not 0 < n_columns <= stride:
        raise ValueError(f"cross_entropy: {n_columns} columns do not fit {logits.shape}")
    for name, tensor in (("labels", labels), ("losses", losses), ("correct", correct)):
        check_shape(f"cross_entropy {name}", tensor, rows)
    tensors = [extent.uniform, logits, labels, losses, correct]
    if step is not None:
        tensors.append(step)
    constants = {
        "vocab_size": n_columns,
        "stride": stride,
        "lanes": 256 if n_columns > 4096 else 64,
        "with_gradient": step is not None,
        "softcap": softcap,
    }
    program.dispatch("cross_entropy", constants, tensors, rows)
