"""Gradients of rows of the embedding that are trained themselves."""

from __future__ import annotations

from typing import Any

from lora.backward.matmul import Accumulate, matmul_backward
from lora.forward.model.trained_tokens import TokenRows
from lora.forward.token_rows import token_columns
from lora.shaders.activations import check_f32, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor

GPU_QUADS, GPU_SPLITS = 16, 8  # of columns in a workgroup; lanes that share one
CPU_QUADS, CPU_SPLITS = 8, 1


def embedding_gradient(
    program: Program,
    tokens: Tensor,
    trained: TokenRows,
    d_x: Tensor,
    out: Tensor,
    *,
    scale: float = 1.0,
) -> None:
    """Appends d_rows[j] += scale · Σ d_x[m] over the rows m whose token is j's.

    Args:
        tokens: u32 [rows].
        d_x: f32 [rows, hidden_size], the gradient to the embeddings.
        out: f32, as the trained rows, added to.
        scale: as of `embedding`.
    """
    check_shape("token_gradient tokens", tokens, d_x.shape[0])
    constants = {"of_head": False, "scale": scale}
    check_shape("token_gradient output", out, *trained.rows.shape)
    _record(program, constants, [tokens, trained.index.ids], d_x, out)


def take_logits(program: Program, d_logits: Tensor, trained: TokenRows, own: Tensor) -> None:
    """Appends own = the trained tokens' columns of d_logits, which are 0 then.

    What goes through the base's rows has none of theirs after that.

    Args:
        d_logits: f32 [rows, vocab_size or more].
        own: f32 [rows, tokens in whole quads].
    """
    token_columns(program, trained, own, d_logits, take=True)


def logits_gradient(
    program: Program, x: Tensor, own: Tensor, trained: TokenRows, out: Tensor
) -> None:
    """Appends d_rows += ownᵀ · x.

    Args:
        x: f32 [rows, hidden_size], what the head was given.
        own: f32 [rows, tokens in whole quads], of `take_logits`.
        out: f32, as the trained rows, added to.
    """
    check_shape("token_gradient logits", own, x.shape[0], trained.rows.shape[0])
    check_shape("token_gradient output", out, *trained.rows.shape)
    add_outer_product(program, own, x, out)


def add_outer_product(program: Program, left: Tensor, right: Tensor, out: Tensor) -> None:
    """Appends out += leftᵀ · right.

    Args:
        left: f32 [rows, few columns].
        right: f32 [rows, columns].
        out: f32 [few columns, columns].
    """
    check_f32("token_gradient", own=left)
    check_shape("token_gradient left", left, right.shape[0], out.shape[0])
    _record(program, {"of_head": True, "scale": 1.0}, [left], right, out)


def logits_input_gradient(program: Program, own: Tensor, trained: TokenRows, out: Tensor) -> None:
    """Appends d_x += own · rows, beside what goes through the base's rows."""
    matmul_backward(
        program, own, trained.matrix, out=out, before=Accumulate(), label="head_tokens_backward"
    )


def _record(
    program: Program,
    constants: dict[str, Any],
    weights: list[Tensor],
    v: Tensor,
    out: Tensor,
) -> None:
    n_columns, width = out.shape
    check_f32("token_gradient", v=v, out=out)
    check_shape("token_gradient", v, None, width)
    if width % 4 or n_columns % 4:
        raise ValueError(f"token_gradient: {out.shape} are no multiples of 4")
    is_cpu = program.recording.facts.is_cpu
    quads, splits = (CPU_QUADS, CPU_SPLITS) if is_cpu else (GPU_QUADS, GPU_SPLITS)
    column_groups = -(-(width // 4) // quads)
    extent = extent_of(v)
    program.dispatch(
        "token_gradient",
        {
            **constants,
            "n_columns": n_columns,
            "width": width,
            "quads": quads,
            "splits": splits,
            "column_groups": column_groups,
        },
        [extent.uniform, *weights, v, out],
        column_groups * (n_columns // 4),
        label="token_gradient",
    )
