"""The gradient of causal self-attention; scores are computed again (Dao 2022, 2023)."""

from __future__ import annotations

from forward.activations import activation, check_shape, extent_of
from forward.attention import attention_constants, choose_tile, visible_pairs
from shaders.program import Program
from shaders.tensor import Tensor


def attention_backward(
    program: Program,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    segments: Tensor,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_size: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    d_qkv: Tensor | None = None,
    dots: Tensor | None = None,
) -> Tensor:  # [rows, (n_heads + 2 n_kv_heads) · head_size]
    """Appends the gradient of `attention` to its qkv: three dispatches, no atomics.

    Bit for bit, an example's result does not depend on where it lies or on what lies beside it.

    Args:
        program: what the dispatches are appended to.
        qkv: [rows, (n_heads + 2 n_kv_heads) · head_size], as the forward had it.
        out: [rows, n_heads · head_size], the forward's result.
        lse: [rows, n_heads], the forward's other result.
        d_out: [rows, n_heads · head_size].
        segments: u32 [rows, 2], as the forward had them.
        n_heads: and the options after it: as the forward had them.
        n_kv_heads: see `attention`.
        head_size: see `attention`.
        scale: see `attention`.
        window: see `attention`.
        softcap: see `attention`.
        d_qkv: where to write; a new tensor by default.
        dots: [rows, n_heads], scratch for each row's d_out · out; a new tensor by default.
    """
    rows, extent = qkv.shape[0], extent_of(qkv)
    constants = attention_constants(
        qkv, segments, n_heads, n_kv_heads, head_size, scale, window, softcap
    )
    check_shape("attention output", out, rows, n_heads * head_size)
    check_shape("attention d_out", d_out, rows, n_heads * head_size)
    check_shape("attention log-sum-exp", lse, rows, n_heads)
    d_x = d_qkv if d_qkv is not None else activation(program, extent, qkv.shape[1])
    check_shape("attention d_qkv", d_x, *qkv.shape)
    row_dots = dots if dots is not None else activation(program, extent, n_heads)
    check_shape("attention dots", row_dots, rows, n_heads)
    pairs = visible_pairs(extent.maximum, window)

    program.dispatch(
        "attention_backward_dots",
        {"n_heads": n_heads, "head_size": head_size},
        [extent.uniform, out, d_out, row_dots],
        -(-extent.maximum * n_heads // 8),
    )
    tensors = [extent.uniform, qkv, d_out, lse, row_dots, segments, d_x]
    tile, workgroups = choose_tile(program, extent.maximum, n_heads, head_size, n_sums=1)
    program.dispatch(
        "attention_backward_q",
        {**constants, **tile},
        tensors,
        workgroups,
        flops=6 * head_size * n_heads * pairs,
    )
    tile, workgroups = choose_tile(program, extent.maximum, n_kv_heads, head_size, n_sums=2)
    program.dispatch(
        "attention_backward_kv",
        {**constants, **tile},
        tensors,
        workgroups,
        flops=8 * head_size * n_heads * pairs,
    )
    return d_x
