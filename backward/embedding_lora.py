"""Gradients of LoRA on the embedding."""

from __future__ import annotations

from lora.backward.token_rows import add_outer_product
from lora.forward.embedding_lora import look_up
from lora.forward.matmul import matmul
from lora.forward.model.trained_tokens import EmbeddingFactors
from lora.forward.product import Product
from lora.shaders.activations import check_f32, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


def embedding_lora_gradients(
    program: Program,
    tokens: Tensor,
    order: Tensor,
    lora: EmbeddingFactors,
    d_x: Tensor,
    gradient: EmbeddingFactors,
    *,
    scale: float,
) -> None:
    """Appends d_B += zᵀ · d_x and d_A[tokens[m]] += s · scale · d_x[m] · Bᵀ.

    Args:
        tokens: u32 [rows].
        order: u32 [rows], `token_order` of those in use.
        d_x: f32 [rows, hidden_size], the gradient to the embeddings.
        gradient: added to.
        scale: what embeddings are multiplied by.
    """
    extent, rank = extent_of(d_x), lora.b.shape[0]
    check_f32("embedding_lora", d_x=d_x)
    check_shape("embedding_lora d_x", d_x, extent.maximum, lora.b.shape[1])
    check_shape("embedding_lora order", order, extent.maximum)
    z = look_up(program, tokens, lora, extent, scale=scale)
    add_outer_product(program, z, d_x, gradient.b)
    d_z = matmul(program, Product(d_x, lora.matrix), label="embedding.d_z")
    program.dispatch(
        "embedding_scatter",
        {"width": rank, "scale": lora.scale * scale},
        [extent.uniform, tokens, order, d_z, gradient.a],
        -(-extent.maximum * (rank // 4) // 64),
    )
