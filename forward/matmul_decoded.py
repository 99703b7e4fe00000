"""Products for matrix units whose weights are decoded first, once for all rows, into f16.

A tile decodes its weights on the way in, and so does every other tile of the same columns: with
thousands of rows that costs more than decoding the matrix into memory once and reading f16. The
weights are the same numbers, and so is the result, to the last bit.
"""

from __future__ import annotations

from dataclasses import replace

from lora.forward.decode_weights import decode_weights
from lora.forward.matmul_matrix import fits_matrix, record_matrix
from lora.forward.model.weights import MOST_DECODED
from lora.forward.part_product import PartProduct
from lora.forward.plans.matmul_plans import Request
from lora.forward.plans.matmul_tiles import Plan
from lora.shaders.program import Program
from lora.shaders.recording import Recording

_LEAST_ROWS = 512  # fewer don't make up for a pass over the matrix


def fits_decoded(recording: Recording, one: PartProduct) -> bool:
    """Where matrix units compute a large product with weights that are no f16 yet."""
    weights = one.contraction * one.n_columns
    columns = one.n_columns if one.transposed else one.contraction
    return (
        fits_matrix(recording, one)
        and one.x.shape[0] >= _LEAST_ROWS
        and one.part.quantization.name != "f16"
        and columns % 8 == 0
        and 2 * weights <= min(MOST_DECODED, recording.facts.max_binding)
    )


def record_decoded(program: Program, request: Request, plan: Plan | None) -> None:
    """Appends the decoding, and the product with what it leaves."""
    c = request.constants
    columns = c["weight_columns"]
    rows = c["contraction"] if c["transposed"] else c["n_columns"]
    scratch = program.recording.memory.scratch((rows, columns // 2))
    decoded = replace(scratch, dtype="u32")
    tensors = list(request.tensors)
    powers = tensors[-1] if c["powered"] else None
    decode_weights(
        program, tensors[2], c["quantization"], out=decoded, powers=powers, label=request.label
    )
    tensors[2] = decoded
    constants = {**c, "quantization": "f16", "row_words": columns // 2}
    own = replace(request, constants=constants, tensors=tensors)
    record_matrix(program, own, plan, decoded=True)
