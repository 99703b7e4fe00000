"""Rows of the embedding, and of a head that is the embedding, that are trained themselves.

PEFT's TrainableTokensLayer: W' is W with some rows replaced. The embedding looks up W', and where
the head is the embedding its logits are x · W'ᵀ.
"""

from __future__ import annotations

from dataclasses import replace

from lora.forward.gather import gather_rows
from lora.forward.matmul import matmul
from lora.forward.model.trained_tokens import TokenRows
from lora.forward.product import Product
from lora.shaders.activations import check_f32, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Extent, Tensor


def replace_rows(
    program: Program,
    tokens: Tensor,
    trained: TokenRows,
    extent: Extent,
    out: Tensor,
    *,
    scale: float = 1.0,
) -> None:
    """Appends y[m] = rows of tokens[m] · scale, over the base's, for tokens that are trained.

    Args:
        tokens: u32 [extent.maximum], each below the vocabulary's size (the host checks).
        extent: how many tokens are in use.
        out: f32 [extent.maximum, hidden_size].
        scale: as of `embedding`.
    """
    width = trained.rows.shape[1]
    check_f32("token_rows", rows=trained.rows, out=out)
    check_shape("token_rows tokens", tokens, extent.maximum)
    check_shape("token_rows output", out, extent.maximum, width)
    if width % 4:
        raise ValueError(f"token_rows: hidden_size {width} is no multiple of 4")
    program.dispatch(
        "token_rows",
        {"width": width, "scale": scale},
        [extent.uniform, tokens, trained.index.slots, trained.rows, out],
        -(-extent.maximum * (width // 4) // 64),
    )


def replace_logits(
    program: Program, head: Product, trained: TokenRows, own: Tensor, logits: Tensor
) -> None:
    """Appends the (capped) logits of trained tokens over those of the base's rows.

    Args:
        head: the product that gave the logits; what its factors add is added here, too.
        own: f32 [rows, tokens in whole quads], written: their logits.
        logits: f32 [rows, vocab_size or more], columns of which are written.
    """
    matmul(program, of_tokens(program, head, trained), out=own, label="head.tokens")
    token_columns(program, trained, own, logits, take=False)


def of_tokens(program: Program, head: Product, trained: TokenRows) -> Product:
    """The product of a head with the trained rows alone; appends what gathers B's rows of them."""
    lora = head.lora
    if lora is not None:
        index = trained.index
        b = gather_rows(program, lora.b, index.ids, index.extent, label="head.tokens.b")
        lora = replace(lora, b=replace(b, extent=None), ranges=((0, b.shape[0]),))
    return replace(head, matrix=trained.matrix, lora=lora)


def token_columns(
    program: Program, trained: TokenRows, own: Tensor, logits: Tensor, *, take: bool
) -> None:
    """Appends the way of trained tokens' columns out of logits (to take them leaves 0) or back."""
    rows, stride = logits.shape
    n_columns = trained.rows.shape[0]
    check_f32("token_columns", own=own, logits=logits)
    check_shape("token_columns", own, rows, n_columns)
    extent = extent_of(logits)
    program.dispatch(
        "token_columns",
        {
            "take": take,
            "n_tokens": trained.index.n_tokens,
            "n_columns": n_columns,
            "stride": stride,
        },
        [extent.uniform, trained.index.ids, own, logits],
        -(-extent.maximum * n_columns // 64),
    )
