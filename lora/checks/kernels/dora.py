"""DoRA: lengths of rows, columns scaled by them, and the gradients."""

from __future__ import annotations

from functools import partial

import numpy as np
from gguf import GGMLQuantizationType

from lora.backward.dora import dora_gradient
from lora.checks.comparison import Check, Comparison, compare, needs_half, same, untouched, worst
from lora.checks.references.matmul import error_bound
from lora.checks.tensors import extent_in_use, frozen, normal, rounded, typed, typed_marked
from lora.forward.dora import DoraGroup, allocate_lengths, row_lengths, scale_columns
from lora.forward.model.factors import DoraTensors, LoraFactors
from lora.shaders.program import Program
from lora.shaders.recording import Recording

ROWS, IN_USE, WIDTH, COLUMNS, RANK, SCALE = 37, 35, 256, 160, 8, 1.7
RANGES, MEMBER_SCALES = ((0, 132), (140, 152)), (1.0, 0.5)
N_B = 144
_PLACES = np.r_[0:132, 140:152]  # of the adapted columns


def adapter_on(
    recording: Recording, a: np.ndarray, b: np.ndarray, m: np.ndarray, tensors: DoraTensors
) -> LoraFactors:
    """A, B and magnitudes behind each other in one buffer, as in training."""
    starts = np.cumsum([0, *(-(-values.size // 64) * 64 for values in (a, b, m))])
    flat = np.zeros(starts[-1], np.float32)
    for start, values in zip(starts, (a, b, m), strict=False):
        flat[start : start + values.size] = values.reshape(-1)
    whole = recording.memory.upload(flat)
    of_a, of_b, of_m = (
        whole.slice(int(start), int(start) + values.size).reshape(*values.shape)
        for start, values in zip(starts, (a, b, m), strict=False)
    )
    return LoraFactors(of_a, of_b, RANK, SCALE, RANGES, MEMBER_SCALES, of_m, tensors)


def check_dora(recording: Recording, dtype: str) -> Comparison:
    """Lengths to some roundings of what they are summed of; then products and sums."""
    if dtype == "f16":
        needs_half(recording)
    memory, program = recording.memory, Program(recording)
    matrix, w = frozen(recording, GGMLQuantizationType.Q4_0, COLUMNS, WIDTH)
    a, b, m = normal(3, 2 * RANK, WIDTH), normal(4, N_B, RANK), np.abs(normal(5, N_B))
    (tensors,) = allocate_lengths(recording, [matrix])
    lora = adapter_on(recording, a, b, m, tensors)
    row_lengths(program, [DoraGroup(matrix, lora)])
    extent = extent_in_use(recording, ROWS, IN_USE)
    p, d_y = (rounded(normal(seed, ROWS, COLUMNS), dtype) for seed in (6, 7))
    residual, bias = normal(8, ROWS, COLUMNS), normal(9, COLUMNS)
    p_t, d_y_t = (typed(recording, values, dtype, extent) for values in (p, d_y))
    y, d_p = (typed_marked(recording, kind, extent, COLUMNS) for kind in ("f32", dtype))
    start = normal(10, N_B)
    d_m = memory.upload(start)
    scale_columns(
        program, p_t, tensors.scales, y, bias=memory.upload(bias),
        residual=typed(recording, residual, "f32", extent),
    )  # fmt: skip
    dora_gradient(program, d_y_t, p_t, lora, d_m, d_p)
    program.run()
    whole = w[_PLACES].copy()
    for g, (rows, scale) in enumerate(
        zip((slice(0, 132), slice(132, 144)), MEMBER_SCALES, strict=True)
    ):
        whole[rows] += SCALE * scale * b[rows].astype(np.float64) @ a[g * RANK : (g + 1) * RANK]
    scales, inverses = np.ones(COLUMNS), np.zeros(COLUMNS)
    inverses[_PLACES] = 1 / np.linalg.norm(whole, axis=1)
    scales[_PLACES] = m * inverses[_PLACES]
    used, read = slice(0, IN_USE), memory.read
    expected_y = scales * p + bias + residual
    sums = (d_y[used].astype(np.float64) * p[used]).sum(0)
    sizes = np.abs(d_y[used].astype(np.float64) * p[used]).sum(0)
    rtol = 2e-3 if dtype == "f16" else 1e-5
    bound = (error_bound(sizes, IN_USE) * 4 + 1e-4 * sizes) * inverses
    return worst(
        compare(read(tensors.scales), scales, rtol=1e-5),
        compare(read(tensors.powers[0]), np.append(scales, (1, 1)), rtol=1e-5),
        compare(read(tensors.inverses), inverses, rtol=1e-5),
        compare(read(y)[used], expected_y[used], rtol=1e-4, atol=1e-4),
        compare(read(d_p)[used].astype(np.float64), (scales * d_y)[used], rtol=rtol + 1e-4,
                atol=1e-6),
        compare(read(d_m), start + (sums * inverses)[_PLACES], bound=bound[_PLACES] + 1e-6),
        same(read(tensors.scales)[132:140], np.ones(8)),
        untouched(read(y)[IN_USE:]),
        untouched(read(d_p)[IN_USE:].astype(np.float32)),
    )  # fmt: skip


CHECKS = [
    Check("dora", f"{ROWS}x{COLUMNS} {dtype}", partial(check_dora, dtype=dtype), as_cpu)
    for dtype, as_cpu in (("f32", True), ("f32", False), ("f16", False))
]
