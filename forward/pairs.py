"""Numbers of f32 as pairs of f16, made once for all tiles that read them (parts/pairs.wgsl)."""

from __future__ import annotations

from lora.forward.part_product import Place, place_uniforms
from lora.shaders.activations import extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


def pair_rows(
    program: Program,
    x: Tensor,
    columns: int,
    place: Place | None,
    *,
    largest: Tensor,
    out: Tensor,
    label: str,
) -> None:
    """Appends what `largest_of_rows` finds, and the rows as pairs, scaled by it.

    Args:
        x: f32 [rows, …], an activation.
        columns: of x that are taken.
        place: where they begin; None for the first.
        largest: u32 [rows].
        out: u32 [2, rows, padded columns / 2], upper halves and lower ones, two f16 a word; zeros
            beyond the columns; padded columns a multiple of 8.
    """
    extent = extent_of(x)
    constants = {
        "x_stride": x.shape[1],
        "columns": columns,
        "padded_columns": 2 * out.shape[2],
        "maximum_rows": out.shape[1],
        "placed": place is not None,
    }
    program.dispatch(
        "pair_rows",
        constants,
        [extent.uniform, x, largest, out, *place_uniforms(program, place)],
        extent.maximum,
        label=f"{label}.pairs",
    )


def pair_weights(
    program: Program,
    words: Tensor,
    quantization: str,
    largest: Tensor,
    *,
    by_columns: bool,
    out: Tensor,
    label: str,
) -> None:
    """Appends a quantized matrix as pairs.

    Args:
        words: u32 [rows, row_words], as a part of a `FrozenMatrix` has them.
        quantization: its name.
        largest: u32 [rows + columns], of `record_largest`.
        by_columns: whether it is columns that are scaled by their largest numbers, or rows.
        out: u32 [2, padded rows, padded columns / 2], upper halves and lower ones, two f16 a word;
            zeros beyond rows and columns; padded columns a multiple of 8.
    """
    rows, row_words = words.shape
    _, padded_rows, half = out.shape
    constants = {
        "quantization": quantization,
        "rows": rows,
        "columns": largest.size - rows,
        "row_words": row_words,
        "padded_rows": padded_rows,
        "padded_columns": 2 * half,
        "by_columns": by_columns,
    }
    eights = padded_rows * half // 4
    program.dispatch(
        "pair_weights", constants, [words, largest, out], -(-eights // 256), label=f"{label}.decode"
    )
