"""The head and its loss, on the rows that have a target only, a chunk of logits at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora.forward.cross_entropy import GPU_BLOCK, Criterion, Objective, cross_entropy
from lora.forward.dropout import Dropout, GroupDropout
from lora.forward.gather import gather_rows
from lora.forward.lora import lora_project
from lora.forward.matmul import matmul
from lora.forward.matmul_matrix import has_matrix_units, takes_blocks, takes_copies
from lora.forward.matmul_paired import scales_rows
from lora.forward.model.adaptable import HEAD_GROUP
from lora.forward.model.factors import Factors
from lora.forward.model.frozen_model import Model
from lora.forward.model.inputs import CHUNK_ALIGNMENT, Inputs
from lora.forward.product import Product
from lora.forward.rmsnorm import rmsnorm
from lora.forward.token_rows import replace_logits
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

# The logits that exist at one time: so many bytes, or those of so many rows where that is more. On
# an H200 half as many rows cost a step of Gemma 3 270M 6%, four times as many would save 3%.
CHUNK_BYTES, CHUNK_ROWS = 64 << 20, 128
# Matrix units want more of them for the time that decoding a tile of weights takes. Where a
# micro-batch has no more than these it is small, and logits of a vocabulary of 248,320 would be a
# quarter of all memory: there half of them are made at once.
MATRIX_CHUNK_ROWS, MATRIX_CHUNK_BYTES = 512, 256 << 20
_HEAD_BINDINGS = 4  # of its product, beside the sizes of its rows: x, W, its powers, the logits


def chunk_size(recording: Recording, logits_size: int, maximum_targets: int) -> int:
    """Target rows whose logits are made at once: a multiple of 64, by memory, in equal chunks."""
    row_bytes = 4 * logits_size
    on_units = recording.half_products and has_matrix_units(recording.facts)
    rows = MATRIX_CHUNK_ROWS if on_units else CHUNK_ROWS
    if on_units and maximum_targets <= rows and rows * row_bytes > MATRIX_CHUNK_BYTES:
        rows //= 2
    most = min(max(CHUNK_BYTES, rows * row_bytes), recording.facts.max_binding) // row_bytes
    most = max(CHUNK_ALIGNMENT, most // CHUNK_ALIGNMENT * CHUNK_ALIGNMENT)
    n_chunks = -(-maximum_targets // most)
    return -(-maximum_targets // (n_chunks * CHUNK_ALIGNMENT)) * CHUNK_ALIGNMENT


def _is_trained(model: Model, factors: Factors) -> bool:
    """Whether other kernels than products read what a head is given, and the logits' gradient."""
    of_head = factors.get((model.architecture.n_layers, "head"))
    return of_head is not None or factors.tokens is not None


def gradient_halves(recording: Recording, model: Model, factors: Factors) -> bool:
    """Whether the gradient to the logits is f16: where the product alone reads it, by such tiles.

    These round it to f16 anyway: what comes of it has the same bits, at half the traffic. It is
    (p − [label]) · weight, at most the loss scale by size; beyond f16's numbers a step is run again
    with a smaller one.
    """
    if recording.precision != "f16" or recording.facts.is_cpu:
        return False
    if _is_trained(model, factors):
        return False
    return takes_blocks(recording, model.head, GPU_BLOCK)


def scales_input(recording: Recording, model: Model, factors: Factors) -> bool:
    """Whether what the head is given is f16, of rows that are scaled: if only a product reads it.

    A tile makes the same of rows of f32, whose sizes are a dispatch of their own.
    """
    if _is_trained(model, factors):
        return False
    return takes_copies(recording) and scales_rows(recording, "f32", _HEAD_BINDINGS)


@dataclass(frozen=True)
class HeadActivations:
    """What the head computes: the rows that have a target, compactly, and a chunk of logits."""

    picked: Tensor  # [targets, hidden_size], the residual stream of those rows
    normed: Tensor  # [targets, hidden_size], f32, or as `scales_input` says
    z: Tensor | None  # [targets, rank], where the head is adapted
    logits: Tensor  # [chunk, logits_size]; turned into their gradient in place
    losses: Tensor  # [targets], −log-probability of each label
    correct: Tensor  # [targets]: 1 where the label is the argmax
    own: Tensor | None = None  # [chunk, tokens in whole quads], where rows of the head are trained
    sizes: Tensor | None = None  # u32 [targets], of rows of `normed` that are scaled
    halves: bool = False  # whether the gradient takes half of the logits' place, as f16

    @classmethod
    def allocate(
        cls, recording: Recording, model: Model, inputs: Inputs, factors: Factors
    ) -> HeadActivations:
        """Tensors for the head."""
        a, targets = model.architecture, inputs.targets
        lora = factors.get((a.n_layers, "head"))

        def tensor(*shape: int, dtype: str = "f32") -> Tensor:
            return recording.memory.empty((targets.maximum, *shape), dtype, extent=targets)

        start, stop, extent = inputs.chunks[0]
        own, tokens, scaled = None, factors.tokens, scales_input(recording, model, factors)
        if tokens is not None and tokens.in_head:
            shape = stop - start, tokens.rows.shape[0]
            own = recording.memory.empty(shape, extent=extent, purpose="logits")
        return cls(
            picked=tensor(a.hidden_size),
            normed=tensor(a.hidden_size, dtype="f16" if scaled else "f32"),
            z=None if lora is None else tensor(lora.rank),
            logits=recording.memory.empty(
                (stop - start, a.logits_size), extent=extent, purpose="logits"
            ),
            losses=tensor(),
            correct=tensor(),
            own=own,
            sizes=tensor(dtype="u32") if scaled else None,
            halves=gradient_halves(recording, model, factors),
        )


def record_head_input(
    program: Program, model: Model, inputs: Inputs, act: HeadActivations, x: Tensor
) -> None:
    """Appends: the rows of x [rows, hidden_size] that have a target, and their final norm."""
    gather_rows(program, x, inputs.target_rows, inputs.targets, out=act.picked)
    rmsnorm(program, act.picked, model.output_norm, out=act.normed, sizes=act.sizes)


def chunk_of(tensor: Tensor, inputs: Inputs, index: int) -> Tensor:
    """The rows of a tensor over targets that belong to one chunk, with the chunk's extent."""
    start, stop, extent = inputs.chunks[index]
    return replace(tensor.slice(start, stop), extent=extent)


def own_logits(act: HeadActivations, inputs: Inputs, index: int) -> Tensor | None:
    """Where the logits of trained tokens go, of one chunk; None where the head has none."""
    if act.own is None:
        return None
    start, stop, extent = inputs.chunks[index]
    return replace(act.own, shape=(stop - start, act.own.shape[1]), extent=extent)


def head_dropout(dropout: Dropout, model: Model, inputs: Inputs, index: int) -> GroupDropout:
    """Dropout before the adapted head, for one chunk of targets."""
    start, stop, extent = inputs.chunks[index]
    own = dropout.of_head(model.architecture.n_layers, HEAD_GROUP, start, stop)
    return replace(own, rows=replace(own.rows, extent=extent))


def record_logits(
    program: Program,
    model: Model,
    inputs: Inputs,
    factors: Factors,
    act: HeadActivations,
    index: int,
    dropout: Dropout | None = None,
) -> Tensor:  # [chunk, logits_size]
    """Appends the (capped) logits of one chunk of targets; columns past the vocabulary are zero."""
    start, stop, extent = inputs.chunks[index]
    logits = replace(act.logits, shape=(stop - start, act.logits.shape[1]), extent=extent)
    normed = chunk_of(act.normed, inputs, index)
    lora = factors.get((model.architecture.n_layers, "head"))
    z = None
    if lora is not None and act.z is not None:
        z = chunk_of(act.z, inputs, index)
        own = None if dropout is None else head_dropout(dropout, model, inputs, index)
        lora_project(program, normed, lora, out=z, dropout=own, label="head.z")
    softcap = model.architecture.logit_softcap
    sizes = None if act.sizes is None else chunk_of(act.sizes, inputs, index)
    product = Product(normed, model.head, lora=lora, z=z, softcap=softcap, x_largest=sizes)
    matmul(program, product, out=logits, label="head")
    of_tokens = own_logits(act, inputs, index)
    if factors.tokens is not None and of_tokens is not None:
        replace_logits(program, product, factors.tokens, of_tokens, logits)
    return logits


def record_chunk_loss(
    program: Program,
    model: Model,
    inputs: Inputs,
    act: HeadActivations,
    index: int,
    logits: Tensor,
    weights: Tensor | None,
    criterion: Criterion | None = None,
) -> None:
    """Appends the losses of one chunk of targets.

    Args:
        index: of the chunk.
        logits: [chunk, logits_size], of `record_logits`.
        weights: [targets], what each loss counts: the logits become their gradient (to what they
            were before the cap) in place, with act.halves as `gradient_in_blocks`; None leaves
            them.
        criterion: what is minimized; None for −log p of each label.
    """
    weighed: Objective | None = None
    if weights is not None:
        of_chunk = chunk_of(weights, inputs, index)
        weighed = Objective(of_chunk, criterion or Criterion(), act.halves)
    cross_entropy(
        program,
        logits,
        chunk_of(inputs.labels, inputs, index),
        chunk_of(act.losses, inputs, index),
        chunk_of(act.correct, inputs, index),
        weighed,
        vocab_size=model.architecture.vocab_size,
        softcap=model.architecture.logit_softcap,
    )


def record_evaluation(
    program: Program,
    model: Model,
    inputs: Inputs,
    factors: Factors,
    act: HeadActivations,
    x: Tensor,
) -> None:
    """Appends the head without gradients: losses, and whether labels are the argmax.

    Args:
        x: [rows, hidden_size], the output of the last layer.
    """
    with program.scope("head"):
        record_head_input(program, model, inputs, act, x)
        for index in range(len(inputs.chunks)):
            logits = record_logits(program, model, inputs, factors, act, index)
            record_chunk_loss(program, model, inputs, act, index, logits, None)
