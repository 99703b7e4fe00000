"""LoRA on the embedding, as PEFT's: y[m] += s · A[tokens[m]] · B beside the base's row.

A lies as the embedding does, [vocab_size, rank], and B as what comes out, [rank, hidden_size]: both
are transposed against PEFT's. A head that is the embedding stays the base's, as in PEFT.
"""

from __future__ import annotations

from lora.forward.gather import gather_rows
from lora.forward.matmul_bodies import record_product
from lora.forward.model.trained_tokens import EmbeddingFactors
from lora.forward.part_product import PartProduct
from lora.shaders.activations import check_f32, check_shape
from lora.shaders.program import Program
from lora.shaders.tensor import Extent, Tensor


def look_up(
    program: Program, tokens: Tensor, lora: EmbeddingFactors, extent: Extent, *, scale: float
) -> Tensor:  # [extent.maximum, rank]
    """Appends z[m] = s · scale · A[tokens[m]].

    Args:
        tokens: u32 [extent.maximum], each below the vocabulary's size (the host checks).
        extent: how many tokens are in use.
        scale: what embeddings are multiplied by.
    """
    scale *= lora.scale
    return gather_rows(program, lora.a, tokens, extent, scale=scale, label="embedding.z")


def add_embedding(
    program: Program,
    tokens: Tensor,
    lora: EmbeddingFactors,
    extent: Extent,
    out: Tensor,
    *,
    scale: float,
) -> None:
    """Appends out[m] += s · scale · A[tokens[m]] · B, f32 [extent.maximum, hidden_size]."""
    rank, width = lora.b.shape
    check_f32("embedding_lora", out=out)
    check_shape("embedding_lora output", out, extent.maximum, width)
    z = look_up(program, tokens, lora, extent, scale=scale)
    (part,) = lora.matrix.parts
    product = PartProduct(z, part, out, transposed=True, contraction=rank, epilogue="accumulate")
    record_product(program, product, None, "embedding.lora")
