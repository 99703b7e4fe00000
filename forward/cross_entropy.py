"""Softmax cross-entropy on a chunk of logits; its gradient overwrites the logits at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora.forward.part_product import InBlocks
from lora.shaders.activations import check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor

# Lanes of a workgroup, and quads of columns that a lane of it holds at once. A workgroup of a GPU
# takes one such stretch of a row, so that few rows fill it too; one of a CPU device a whole row,
# step by step.
GPU_LANES, GPU_QUADS = 256, 8
CPU_LANES, CPU_QUADS = 8, 2
GPU_BLOCK = 4 * GPU_LANES * GPU_QUADS  # columns of such a stretch


@dataclass(frozen=True)
class Criterion:
    """What is minimized in place of −log p of each label.

    Attributes:
        smoothing: ε of label smoothing (Szegedy et al. 2016), as transformers' LabelSmoother: the
            loss is (1 − ε) · (−log p[label]) + ε · the mean of −log p over all columns.
        dft: the loss is −p · log p with the first p taken as constant (Wu et al. 2025, "On the
            Generalization of SFT", TRL's dft_loss). Not with smoothing.
    """

    smoothing: float = 0.0
    dft: bool = False

    def __post_init__(self) -> None:
        """Refuses what has no meaning."""
        if not 0.0 <= self.smoothing < 1.0 or (self.smoothing and self.dft):
            raise ValueError(f"cross_entropy: smoothing {self.smoothing}, dft {self.dft}")


@dataclass(frozen=True)
class Objective:
    """A criterion, and what each token counts in it: [chunk].

    Attributes:
        halves: whether the gradient is f16 and takes the first halves of the logits' place: see
            `gradient_in_blocks`.
    """

    weights: Tensor
    criterion: Criterion = Criterion()  # noqa: RUF009 - a frozen value
    halves: bool = False


def gradient_in_blocks(logits: Tensor) -> InBlocks:
    """Where `cross_entropy` leaves a gradient in f16: in the place of the logits.

    Each workgroup writes where it alone has read: block after block of columns begins where their
    logits began, and what is between them is stale.
    """
    rows, columns = logits.shape
    halves = replace(logits, shape=(rows, 2 * columns), dtype="f16")
    return InBlocks(halves, GPU_BLOCK)


def cross_entropy(
    program: Program,
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    correct: Tensor,
    weights: Tensor | Objective | None,
    *,
    vocab_size: int | None = None,
    softcap: float | None = None,
) -> None:
    """Appends the losses of a chunk and, where `weights` are given, the gradient to its logits.

    Args:
        logits: [chunk, vocab_size or more], a multiple of 4; overwritten by the gradient (in f16
            a multiple of 8, the columns past vocab_size with zeros).
        labels: u32 [chunk], each a token id (rows without a target never come here).
        losses: [chunk], written: logsumexp(logits) − logits[label], or what an objective makes
            of it.
        correct: [chunk], written: 1 where the label is the argmax, else 0.
        weights: [chunk], what each loss counts in the gradient, or an objective with these; None
            for no gradient.
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
    given = {"labels": labels, "losses": losses, "correct": correct}
    objective = Objective(weights) if isinstance(weights, Tensor) else weights
    if objective is not None:
        given["weights"] = objective.weights
    for name, tensor in given.items():
        check_shape(f"cross_entropy {name}", tensor, rows)
    if stride % 4:
        raise ValueError(f"cross_entropy: {stride} columns are no multiple of 4")
    is_cpu = program.recording.facts.is_cpu
    halves = objective is not None and objective.halves
    if halves and (is_cpu or stride % 8):
        raise ValueError(f"cross_entropy: no gradient in f16 on a CPU, of {stride} columns")
    lanes, quads = (CPU_LANES, CPU_QUADS) if is_cpu else (GPU_LANES, GPU_QUADS)
    steps = -(-n_columns // (4 * lanes * quads)) if is_cpu else 1
    columns = 4 * lanes * quads * steps
    n_stretches = -(-n_columns // columns)
    constants = {
        "vocab_size": n_columns,
        "stride": stride,
        "lanes": lanes,
        "quads": quads,
        "steps": steps,
        "columns": columns,
        "n_stretches": n_stretches,
        "smoothing": 0.0 if objective is None else objective.criterion.smoothing,
    }
    n_sums = 8 if objective is not None and objective.criterion.smoothing else 4
    sums = program.recording.memory.scratch((rows, n_stretches, n_sums))
    program.dispatch(
        "cross_entropy_sums",
        constants,
        [extent.uniform, logits, labels, sums],
        rows * n_stretches,
    )
    tensors = [extent.uniform, sums, labels, losses, correct]
    if objective is not None:
        tensors += [logits, objective.weights]
    program.dispatch(
        "cross_entropy",
        {
            **constants,
            "with_gradient": objective is not None,
            "halves": halves,
            "softcap": softcap,
            "dft": objective is not None and objective.criterion.dft,
        },
        tensors,
        -(-rows // lanes) if objective is None else rows * n_stretches,
    )
