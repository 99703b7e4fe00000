"""A quantized matrix as f16."""

from __future__ import annotations

from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


def decode_weights(
    program: Program,
    words: Tensor,
    quantization: str,
    *,
    out: Tensor,
    powers: Tensor | None = None,
    label: str,
) -> None:
    """Appends out[n, k] = W[n, k] in f16, for the rows that out has.

    Args:
        words: u32 [at least rows, row_words], as a part of a `FrozenMatrix` has them.
        quantization: its name.
        out: u32 [rows, columns / 2], two f16 a word; columns a multiple of 8.
        powers: f32 [rows or more], what rows are multiplied by; None for nothing.
    """
    rows, half = out.shape
    if half % 4 or words.shape[0] < rows:
        raise ValueError(f"{label}: {words.shape} words don't decode to {rows} × {2 * half} f16")
    constants = {
        "quantization": quantization,
        "rows": rows,
        "columns": 2 * half,
        "row_words": words.shape[1],
        "powered": powers is not None,
    }
    lanes = rows * half // 4
    tensors = [words, out, *([] if powers is None else [powers])]
    program.dispatch(
        "decode_weights", constants, tensors, -(-lanes // 256), label=f"{label}.decode"
    )
