"""A quantized matrix as f16."""

from __future__ import annotations

from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


def decode_weights(
    program: Program, words: Tensor, quantization: str, *, out: Tensor, label: str
) -> None:
    """Appends out[n, k] = W[n, k] in f16, for the rows that out has.

    Args:
        words: u32 [at least rows, row_words], as a part of a `FrozenMatrix` has them.
        quantization: its name.
        out: u32 [rows, columns / 2], two f16 a word; columns a multiple of 8.
    """
    rows, half = out.shape
    if half % 4 or words.shape[0] < rows:
        raise ValueError(f"{label}: {words.shape} words don't decode to {rows} × {2 * half} f16")
    constants = {
        "quantization": quantization,
        "rows": rows,
        "columns": 2 * half,
        "row_words": words.shape[1],
    }
    lanes = rows * half // 4
    program.dispatch(
        "decode_weights", constants, [words, out], -(-lanes // 256), label=f"{label}.decode"
    )
