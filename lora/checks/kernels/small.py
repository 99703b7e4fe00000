"""Kernels that look up, pick, turn, gate or count."""

from __future__ import annotations

from functools import partial

import numpy as np
from gguf import GGMLQuantizationType

from lora.backward.losses import loss_weights
from lora.backward.rope import rope_backward
from lora.backward.swiglu import swiglu_backward
from lora.checks.comparison import Check, Comparison, compare, needs_half, same, untouched, worst
from lora.checks.references.rope import rope_backward_reference, rope_reference
from lora.checks.references.swiglu import gate_reference, swiglu_backward_reference
from lora.checks.tensors import (
    activation,
    extent_in_use,
    frozen,
    marked,
    normal,
    rounded,
    typed,
    typed_marked,
)
from lora.forward.argmax import argmax
from lora.forward.decode_weights import decode_weights
from lora.forward.embedding import embedding
from lora.forward.gather import gather_rows
from lora.forward.gguf.quantization import QUANTIZATIONS
from lora.forward.heads import Rotation
from lora.forward.model.inputs import NO_ROW
from lora.forward.model.rope_frequencies import Rope
from lora.forward.rope import rope
from lora.forward.sums import sum_into
from lora.forward.swiglu import swiglu
from lora.shaders.program import Program
from lora.shaders.recording import Recording

ROWS, IN_USE = 67, 66


def check_embedding(recording: Recording, kind: GGMLQuantizationType) -> Comparison:
    """Every type's decoding: exact, since no product of a scale and a quant is rounded."""
    columns = max(96, QUANTIZATIONS[kind].block_size)
    matrix, table = frozen(recording, kind, 50, columns)
    tokens = np.random.default_rng(1).integers(0, 50, ROWS)
    extent = extent_in_use(recording, ROWS, IN_USE)
    out, program = marked(recording, extent, columns), Program(recording)
    embedding(program, activation(recording, tokens, extent), matrix, extent, out=out)
    program.run()
    result = recording.memory.read(out)
    return worst(same(result[:IN_USE], table[tokens][:IN_USE]), untouched(result[IN_USE:]))


def check_decode_weights(recording: Recording, kind: GGMLQuantizationType) -> Comparison:
    """As f16: rounded once, from an f32 that the decoding may have rounded as well."""
    columns = max(96, QUANTIZATIONS[kind].block_size)
    matrix, w = frozen(recording, kind, 50, columns)
    part, program = matrix.parts[0], Program(recording)
    out = recording.memory.empty((50, columns // 2), "u32")
    decode_weights(program, part.words, part.quantization.name, out=out, label="w")
    program.run()
    result = recording.memory.read(out).view(np.float16).astype(np.float64)
    return compare(result, w.astype(np.float64), rtol=1.01 * 2.0**-11, atol=2.0**-25)


def check_gather(recording: Recording) -> Comparison:
    """Rows by index, and zeros where there is none."""
    x, extent = normal(1, 20, 36), extent_in_use(recording, 7, 6)
    indices = np.array([3, NO_ROW, 19, 0, 7, NO_ROW, 1], np.uint32)
    out, program = marked(recording, extent, 36), Program(recording)
    gather_rows(
        program, recording.memory.upload(x), activation(recording, indices, extent), extent, out=out
    )
    program.run()
    expected = np.where((indices == NO_ROW)[:, None], 0, x[np.minimum(indices, 19)])
    result = recording.memory.read(out)
    return worst(same(result[:6], expected[:6]), untouched(result[6:]))


def check_loss_weights(recording: Recording) -> Comparison:
    """One number for every row in use."""
    extent, program = extent_in_use(recording, 131, 130), Program(recording)
    weights, scale = marked(recording, extent), recording.memory.uniform()
    recording.memory.write(scale, np.array([1 / 7, 0, 0, 0], np.float32).view(np.uint32))
    loss_weights(program, scale, weights)
    program.run()
    result = recording.memory.read(weights)
    wanted = np.full(130, np.float32(1 / 7), np.float64)
    return worst(same(result[:130], wanted), untouched(result[130:]))


def check_argmax(recording: Recording) -> Comparison:
    """The first of the largest, of many equal ones."""
    x = np.random.default_rng(2).integers(-3, 3, (7, 3004)).astype(np.float32)
    x[:, 3000:] = 1e30  # past the vocabulary
    extent = extent_in_use(recording, 7, 6)
    out, program = recording.memory.empty((7,), "u32", extent=extent), Program(recording)
    recording.memory.write(out, np.full(7, 99, np.uint32))
    argmax(program, activation(recording, x, extent), out, length=3000)
    program.run()
    return same(recording.memory.read(out), np.array([*x[:6, :3000].argmax(axis=1), 99]))


def check_sum_into(recording: Recording) -> Comparison:
    """Positive terms: 157 additions a lane at most, then a tree, each within 2^-24."""
    values, extent = np.abs(normal(3, 10_001)), extent_in_use(recording, 10_001, 9_999)
    totals, program = recording.memory.upload(np.arange(64, dtype=np.float32)), Program(recording)
    sum_into(program, activation(recording, values, extent), extent, totals, 5)
    program.run()
    expected = np.arange(64, dtype=np.float64)
    expected[5] += values[:9_999].astype(np.float64).sum()
    return compare(recording.memory.read(totals), expected, rtol=1e-5)


def check_rope(recording: Recording, backward: bool, interleaved: bool, dtype: str) -> Comparison:
    """Tables rounded to f32, two products and a sum: 4 ulp of values up to about 5."""
    if dtype == "f16":
        needs_half(recording)
    qkv, positions = rounded(normal(4, ROWS, 100), dtype), np.arange(ROWS) * 61
    extent = extent_in_use(recording, ROWS, IN_USE)
    tensor, program = typed(recording, qkv, dtype, extent), Program(recording)
    tables = recording.memory.upload(Rope(10000.0, 12, interleaved).tables(5000))
    rotation = Rotation(activation(recording, positions, extent), tables, interleaved)
    (rope_backward if backward else rope)(program, tensor, rotation, 3, 20)
    program.run()
    reference = rope_backward_reference if backward else rope_reference
    expected = reference(qkv, positions, 10000.0, 12, 3, 20, interleaved)
    result = recording.memory.read(tensor)
    return worst(
        compare(result[:IN_USE], expected[:IN_USE], atol=2e-6),
        same(result[IN_USE:], qkv[IN_USE:]),
    )


def check_swiglu(recording: Recording, backward: bool, name: str, dtype: str) -> Comparison:
    """exp and tanh are good to some ulp; the slope is a sum of terms of up to 300.

    Backward, what the forward gave is written again.
    """
    if dtype == "f16":
        needs_half(recording)
    gate_up, d_y = rounded(3 * normal(5, ROWS, 200), dtype), rounded(normal(6, ROWS, 100), dtype)
    gate_up[0, 0], gate_up[1, 1] = -80.0, 80.0  # far into both tails
    extent, program = extent_in_use(recording, ROWS, IN_USE), Program(recording)
    source = typed(recording, gate_up, dtype, extent)
    gated, gate = typed_marked(recording, dtype, extent, 100), gate_up[:, :100].astype(np.float64)
    found = [(gated, gate_reference(gate, name) * gate_up[:, 100:], 1e-5)]
    if backward:
        out = typed_marked(recording, dtype, extent, 200)
        given = typed(recording, d_y, dtype, extent)
        swiglu_backward(program, source, given, activation_name=name, out=out, gated=gated)
        found.append((out, swiglu_backward_reference(gate_up, d_y, name), 2e-5))
    else:
        swiglu(program, source, activation_name=name, out=gated)
    program.run()
    results = [(recording.memory.read(tensor), *expected) for tensor, *expected in found]
    return worst(
        *(compare(result[:IN_USE], expected[:IN_USE], rtol=4e-6, atol=atol)
          for result, expected, atol in results),
        *(untouched(result[IN_USE:]) for result, *_ in results),
    )  # fmt: skip


CHECKS = [
    *(
        Check("embedding", f"{ROWS}x{max(96, q.block_size)} {kind.name}",
              partial(check_embedding, kind=kind))
        for kind, q in QUANTIZATIONS.items()
    ),
    *(
        Check("decode_weights", f"50x{max(96, q.block_size)} {kind.name}",
              partial(check_decode_weights, kind=kind))
        for kind, q in QUANTIZATIONS.items()
    ),
    Check("gather", "7x36", check_gather),
    Check("loss_weights", "131", check_loss_weights),
    Check("argmax", "7x3000", check_argmax),
    Check("sum_into", "10001", check_sum_into),
    *(
        Check("rope_backward" if backward else "rope",
              f"{ROWS}x100 {'pairs' if interleaved else 'halves'} {dtype}",
              partial(check_rope, backward=backward, interleaved=interleaved, dtype=dtype))
        for backward, interleaved, dtype in (
            (False, True, "f32"), (False, False, "f32"), (False, False, "f16"), (True, True, "f32"),
        )
    ),
    *(
        Check("swiglu_backward" if backward else "swiglu", f"{ROWS}x100 {name} {dtype}",
              partial(check_swiglu, backward=backward, name=name, dtype=dtype))
        for backward in (False, True)
        for name, dtype in (("silu", "f32"), ("gelu_tanh", "f32"), ("silu", "f16"))
    ),
]  # fmt: skip
