"""Products of one row: of f32 numbers, and of whole numbers with the common quantized types."""

from __future__ import annotations

from functools import partial

import numpy as np
from gguf import GGMLQuantizationType

from lora.checks.comparison import Check, Comparison, NotHereError, compare, worst
from lora.checks.references.int_row import decoded_int_row
from lora.checks.references.matmul import error_bound
from lora.checks.references.matmul_row import gated_reference, normed_row
from lora.checks.references.swiglu import gate_reference
from lora.checks.tensors import activation, extent_in_use, frozen, marked, normal
from lora.forward.gguf.quantization import QUANTIZATIONS
from lora.forward.int_row import BLOCK, IntRow, takes_int_row, to_int_row
from lora.forward.matmul_int_row import matmul_int_row
from lora.forward.matmul_row import matmul_row, project_row
from lora.forward.model.factors import LoraFactors
from lora.forward.model.norm import Norm
from lora.forward.product import Product
from lora.shaders.program import Program
from lora.shaders.recording import Recording

EPSILON, RANK, SCALE = 1e-5, 8, 1.5


def columns_of(kind: GGMLQuantizationType, blocks: int = 2) -> int:
    """A width of whole blocks, of at least 32."""
    return max(32, QUANTIZATIONS[kind].block_size) * blocks


def int_rounding(v: np.ndarray, w: np.ndarray) -> np.ndarray:
    """What rounding v to whole numbers may add to v · Wᵀ: 2^-22 of a block's largest, random."""
    largest = np.repeat(np.abs(v.reshape(-1, BLOCK)).max(axis=1), BLOCK)
    return np.asarray(4 * 2.0**-22 * np.sqrt((largest * w) ** 2 @ np.ones(v.size)))


def check_matmul_row(recording: Recording, kind: GGMLQuantizationType) -> Comparison:
    """The norm before it, a bias and a residual: roundings of f32 sums."""
    columns = columns_of(kind)
    matrix, w = frozen(recording, kind, 72, columns)
    x, weight, bias, residual = (
        normal(1, 1, columns),
        normal(2, columns),
        normal(3, 72),
        normal(4, 72),
    )
    extent, program = extent_in_use(recording, 1, 1), Program(recording)
    y = marked(recording, extent, 72)
    matmul_row(
        program,
        Product(
            activation(recording, x, extent),
            matrix,
            norm=Norm(recording.memory.upload(weight), EPSILON),
            bias=recording.memory.upload(bias),
            residual=activation(recording, residual[None], extent),
        ),
        out=y,
    )
    program.run()
    v = normed_row(x, weight, EPSILON)
    size = np.abs(v) @ np.abs(w).T + np.abs(bias) + np.abs(residual)
    expected = v @ w.T + bias + residual
    return compare(recording.memory.read(y), expected, bound=error_bound(size, columns + 2))


def check_matmul_int_row(recording: Recording, kind: GGMLQuantizationType) -> Comparison:
    """As `matmul_row`, and the rounding to whole numbers, which are 2^-22 of a block's largest."""
    columns = columns_of(kind)
    matrix, w = frozen(recording, kind, 72, columns)
    if not takes_int_row(recording, matrix):
        raise NotHereError(f"{recording.facts.info['backend_type']} takes no rows of whole numbers")
    x, weight = normal(5, 1, columns), normal(6, columns)
    extent, program = extent_in_use(recording, 1, 1), Program(recording)
    row = IntRow.allocate(recording, columns, extent).before_norm(
        Norm(recording.memory.upload(weight), EPSILON)
    )
    y = marked(recording, extent, 72)
    to_int_row(program, activation(recording, x, extent), row)
    matmul_int_row(program, Product(row, matrix), out=y)
    program.run()
    v = normed_row(x, weight, EPSILON)
    bound = error_bound(np.abs(v) @ np.abs(w).T, columns) + int_rounding(v, w)
    stands_for, _ = decoded_int_row(recording.memory.read(row.words), columns)
    exact = x[0].astype(np.float64) * weight
    # Half a step is 2^-23 of the block's largest; scaling rounds a number twice.
    steps = np.repeat(np.abs(exact.reshape(-1, BLOCK)).max(axis=1), BLOCK) * 1.3 * 2.0**-22
    return worst(
        compare(stands_for, exact, bound=steps),
        compare(recording.memory.read(y), v @ w.T, bound=bound),
    )


def check_gated(recording: Recording, whole: bool) -> Comparison:
    """Norm, gate and up with their adapters: an error of the gate passes a slope of 1.13."""
    columns, half = 512, 64
    matrix, w = frozen(recording, GGMLQuantizationType.Q4_K, 2 * half, columns)
    x, weight = 3 * normal(7, 1, columns), normal(8, columns) / np.float32(np.sqrt(columns))
    bias, a, b = normal(9, 2 * half), normal(10, 2 * RANK, columns), normal(11, 2 * half, RANK)
    if whole and not takes_int_row(recording, matrix):
        raise NotHereError(f"{recording.facts.info['backend_type']} takes no rows of whole numbers")
    extent, program = extent_in_use(recording, 1, 1), Program(recording)
    norm, row = (
        Norm(recording.memory.upload(weight), EPSILON),
        activation(recording, x, extent),
    )
    ranges = ((0, half), (half, 2 * half))
    lora = LoraFactors(recording.memory.upload(a), recording.memory.upload(b), RANK, SCALE, ranges)
    z, y = project_row(program, row, lora, norm=norm), marked(recording, extent, half)
    bias_t = recording.memory.upload(bias)
    if whole:
        ints = IntRow.allocate(recording, columns, extent).before_norm(norm)
        matmul_int_row(
            program,
            Product(
                to_int_row(program, row, ints), matrix, gate="silu", lora=lora, z=z, bias=bias_t
            ),
            out=y,
        )
    else:
        matmul_row(
            program,
            Product(row, matrix, norm=norm, gate="silu", lora=lora, z=z, bias=bias_t),
            out=y,
        )
    program.run()
    v = normed_row(x, weight, EPSILON)
    gate, up, size = gated_reference(v, w, bias, a, b, (0, 1), SCALE)
    bound = error_bound(size, columns + RANK) + whole * int_rounding(v, w)
    bound = 1.13 * bound[:half] * np.abs(up) + bound[half:] * np.abs(gate) + 2.0**-20 * np.abs(up)
    expected = gate_reference(gate, "silu") * up
    return compare(recording.memory.read(y), expected, rtol=2.0**-20, bound=bound)


def check_project_row(recording: Recording) -> Comparison:
    """z of one row, times the norm's weight but not its division."""
    x, weight, a = normal(12, 1, 576), normal(13, 576), normal(14, 3 * RANK, 576)
    ranges = tuple((4 * m, 4 * m + 4) for m in range(3))
    lora = LoraFactors(
        recording.memory.upload(a), recording.memory.empty((12, RANK)), RANK, 1.0, ranges
    )
    extent, program = extent_in_use(recording, 1, 1), Program(recording)
    z = marked(recording, extent, 3 * RANK)
    norm = Norm(recording.memory.upload(weight), EPSILON)
    project_row(program, activation(recording, x, extent), lora, norm=norm, out=z)
    program.run()
    v = x.astype(np.float64) * weight
    return compare(
        recording.memory.read(z), v @ a.T, bound=error_bound(np.abs(v) @ np.abs(a).T, 576)
    )


CHECKS = [
    *(
        Check("matmul_row", f"1x{columns_of(kind)}x72 {kind.name}",
              partial(check_matmul_row, kind=kind))
        for kind in QUANTIZATIONS
    ),
    Check("matmul_row", "1x512x128 Q4_K, gate and up",
          partial(check_gated, whole=False), as_cpu=True),
    Check("matmul_row", "1x512x128 Q4_K, gate and up", partial(check_gated, whole=False)),
    *(
        Check("matmul_int_row", f"1x{columns_of(kind)}x72 {kind.name}",
              partial(check_matmul_int_row, kind=kind))
        for kind, quantization in QUANTIZATIONS.items()
        if quantization.numbers is not None
    ),
    Check("matmul_int_row", "1x512x128 Q4_K, gate and up", partial(check_gated, whole=True)),
    Check("project_row", "1x576 rank 8", check_project_row),
]  # fmt: skip
