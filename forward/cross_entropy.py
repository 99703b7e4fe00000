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
) -> None:
    """Appends the losses of a chunk and, where `step` is given, the gradient to its logits.

    Args:
        logits: [chunk, vocab_size]; overwritten by the gradient.
        labels: u32 [chunk], each a token id (rows without a target never come here).
        losses: [chunk], written: logsumexp(logits) − logits[label].
        correct: [chunk], written: 1 where the label is the argmax, else 0.
        step: a uniform whose first word is the f32 that every loss is weighted by (one over the
            trained tokens of the optimizer step); None for no gradient.
    """
    extent = extent_of(logits)
    rows, vocab_size = logits.shape
    for name, tensor in (("labels", labels), ("losses", losses), ("correct", correct)):
        check_shape(f"cross_entropy {name}", tensor, rows)
    tensors = [extent.uniform, logits, labels, losses, correct]
    if step is not None:
        tensors.append(step)
    constants = {
        "vocab_size": vocab_size,
        "lanes": 256 if vocab_size > 4096 else 64,
        "with_gradient": step is not None,
    }
    program.dispatch("cross_entropy", constants, tensors, rows)
