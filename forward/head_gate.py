"""The output gate of attention (Qwen3-Next, Qwen3.5): a sigmoid for each number of each head."""

from __future__ import annotations

from typing import Any

from lora.shaders.activations import check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


def gate_constants(raw: Tensor, x: Tensor, head_size: int) -> dict[str, Any]:
    """The template constants that forward and backward share, once the tensors fit."""
    stride, width = raw.shape[1], x.shape[1]
    if head_size % 4 or width % head_size or stride % 4 or stride < 2 * width:
        raise ValueError(f"head_gate: heads of {head_size} do not fit {raw.shape} and {x.shape}")
    return {
        "raw_type": raw.dtype, "x_type": x.dtype, "stride": stride, "width": width,
        "size": head_size,
    }  # fmt: skip


def head_gate(program: Program, raw: Tensor, x: Tensor, head_size: int, out: Tensor) -> None:
    """Appends y = x · σ(gate).

    Args:
        program: what the dispatch is appended to.
        raw: [rows, any width], f32 or f16: for each head its q and then its gate; more may follow.
        x: [rows, heads · head_size], f32 or f16.
        head_size: columns of a head.
        out: shaped as x, f32 or f16.
    """
    check_shape("head_gate output", out, *x.shape)
    check_shape("head_gate raw", raw, x.shape[0], None)
    extent = extent_of(x)
    program.dispatch(
        "head_gate",
        gate_constants(raw, x, head_size) | {"y_type": out.dtype},
        [extent.uniform, raw, x, out],
        -(-extent.maximum * x.shape[1] // 256),
    )
