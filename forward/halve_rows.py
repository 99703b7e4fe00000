"""Copies in f16 of a prompt's rows, for products on matrix units.

What a prompt has between its products is f32, and every tile of a product reads its rows again. Of
f16 it reads half as much, eight numbers in one load.
"""

from __future__ import annotations

from dataclasses import replace

from lora.forward.matmul_matrix import takes_units
from lora.forward.matmul_paired import scales_rows
from lora.forward.part_product import SizedRows
from lora.shaders.activations import check_f32, extent_of
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

LEAST_ROWS = 512  # fewer have few tiles that would read them again


def takes_row_copies(recording: Recording, x: Tensor, n_others: int) -> bool:
    """Whether a product's rows are copied: many of f32, on units that multiply f16.

    Training's rows of f32 have copies already where that pays (`takes_copies`).

    Args:
        x: [rows, columns], as the product has them.
        n_others: storage buffers that the product binds beside the rows' sizes.
    """
    rows, columns = x.shape
    fits = columns % 8 == 0 and 2 * rows * columns <= recording.facts.max_binding
    many = recording.precision == "f32" and rows >= LEAST_ROWS
    return fits and many and takes_units(recording) and scales_rows(recording, x.dtype, n_others)


def halve_rows(program: Program, x: Tensor, *, label: str) -> SizedRows:
    """Appends the copy, each row times the power of two that its largest number asks for.

    It stays until the next one, in scratch memory beside decoded weights and partial sums.

    Args:
        x: f32 [rows, columns], columns a multiple of 8.
    """
    extent, memory = extent_of(x), program.recording.memory
    rows, columns = x.shape
    check_f32("halve_rows", x=x)
    if columns % 8:
        raise ValueError(f"halve_rows: {columns} columns are no multiple of 8")
    scratch = memory.scratch((rows, columns // 2), beside=2)
    halves = replace(scratch, shape=(rows, columns), dtype="f16", extent=extent)
    largest = memory.row_scratch(rows)
    program.dispatch(
        "halve_rows",
        {"columns": columns},
        [extent.uniform, x, halves, largest],
        extent.maximum,
        label=f"{label}.halves",
    )
    return SizedRows(x, largest, halves)
