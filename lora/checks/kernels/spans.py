"""Kernels that norm, scale and copy stretches of rows, and what tokens have for layers."""

from __future__ import annotations

from functools import partial

import numpy as np

from lora.backward.per_layer import per_layer_gate_backward
from lora.backward.span_norm import span_norm_backward
from lora.checks.comparison import Check, Comparison, compare, needs_half, same, untouched, worst
from lora.checks.references.per_layer import (
    per_layer_gate_backward_reference,
    per_layer_gate_reference,
    per_layer_inputs_reference,
)
from lora.checks.references.span_norm import span_norm_backward_reference, span_norm_reference
from lora.checks.tensors import (
    MARKER,
    activation,
    extent_in_use,
    normal,
    rounded,
    typed,
    typed_marked,
)
from lora.forward.copy_columns import copy_columns
from lora.forward.model.norm import Norm
from lora.forward.per_layer import per_layer_gate, per_layer_inputs
from lora.forward.scale_rows import scale_rows
from lora.forward.span_norm import Span, span_norm
from lora.shaders.program import Program
from lora.shaders.recording import Recording

ROWS, IN_USE, EPSILON = 23, 21, 1e-5

# Columns of q and of k as wholes beside a copied v; heads of q, k and v, v's without a weight and
# somewhere else, k's twice.
WHOLE = Span(1, 60, 0, 0, 0), Span(1, 20, 60, 60, 60), Span(1, 20, 80, 80, None, normed=False)
HEADS = Span(3, 20, 0, 0, 0), Span(1, 20, 60, 60, 20), Span(1, 20, 60, 80, None)
# Heads of q with something else between them.
APART = Span(2, 20, 4, 0, 0, stride=32), Span(1, 20, 72, 40, 20)


def check_span_norm(
    recording: Recording, spans: tuple[Span, ...], dtype: str, rows: int = ROWS
) -> Comparison:
    """A sum of squares in a tree, a root and two products of numbers up to 8."""
    if dtype == "f16":
        needs_half(recording)
    in_use = max(1, rows - 2)
    x, weights = rounded(normal(1, rows, 100), dtype), 1 + 0.3 * normal(2, 80)
    extent, program = extent_in_use(recording, rows, in_use), Program(recording)
    out = typed_marked(recording, dtype, extent, 100)
    source = typed(recording, x, dtype, extent)
    span_norm(program, source, recording.memory.upload(weights), EPSILON, spans, out)
    program.run()
    expected = span_norm_reference(x, weights, EPSILON, spans, np.full(x.shape, MARKER))
    result = recording.memory.read(out)
    return worst(
        compare(result[:in_use], expected[:in_use], rtol=4e-6, atol=4e-6),
        untouched(result[in_use:]),
    )


def check_span_norm_backward(
    recording: Recording, spans: tuple[Span, ...], dtype: str, in_place: bool
) -> Comparison:
    """Two sums at once, and differences of terms up to 30; what is added up is rounded twice."""
    if dtype == "f16":
        needs_half(recording)
    x, d_y = (rounded(normal(seed, ROWS, 100), dtype) for seed in (1, 3))
    weights = 1 + 0.3 * normal(2, 80)
    extent, program = extent_in_use(recording, ROWS, IN_USE), Program(recording)
    given, source = typed(recording, d_y, dtype, extent), typed(recording, x, dtype, extent)
    uploaded = recording.memory.upload(weights)
    expected = span_norm_backward_reference(x, weights, EPSILON, spans, d_y)
    if in_place:
        out, before = given, d_y
        spans = tuple(span for span in spans if span.normed)
        span_norm_backward(program, source, uploaded, EPSILON, spans, given, given)
        expected[:, 80:] = d_y[:, 80:]
    else:
        # A span that reads what another does is added to what that one has left.
        out, before = typed(recording, 0 * d_y, dtype, extent), 0 * d_y
        for number, span in enumerate(spans):
            span_norm_backward(
                program, source, uploaded, EPSILON, [span], given, out, accumulate=number > 0
            )
    program.run()
    result = recording.memory.read(out)
    atol = 1e-5 if dtype == "f32" else 2**-8
    return worst(
        compare(result[:IN_USE], expected[:IN_USE], rtol=1e-5, atol=atol),
        same(result[IN_USE:], before[IN_USE:]),
    )


def check_copy_columns(recording: Recording, accumulate: bool, dtype: str) -> Comparison:
    """Copies are exact; a sum is rounded once."""
    if dtype == "f16":
        needs_half(recording)
    x, y = rounded(normal(7, ROWS, 36), dtype), normal(8, ROWS, 28)
    extent, program = extent_in_use(recording, ROWS, IN_USE), Program(recording)
    out = typed(recording, y, "f32", extent)
    source = typed(recording, x, dtype, extent)
    copy_columns(program, source, 12, out, 4, 20, accumulate=accumulate)
    program.run()
    expected = y.astype(np.float64)
    part = expected[:IN_USE, 4:24]
    expected[:IN_USE, 4:24] = x[:IN_USE, 12:32] + (part if accumulate else 0)
    return compare(recording.memory.read(out), expected, rtol=2e-7, atol=2e-7 * accumulate)


def check_per_layer_inputs(recording: Recording, dtype: str) -> Comparison:
    """A norm, and a sum of numbers up to 30."""
    if dtype == "f16":
        needs_half(recording)
    projected, table = rounded(normal(9, ROWS, 3 * 20), dtype), normal(10, ROWS, 3 * 20)
    weight = 1 + 0.3 * normal(11, 20)
    extent, program = extent_in_use(recording, ROWS, IN_USE), Program(recording)
    tensor = typed(recording, projected, dtype, extent)
    norm = Norm(recording.memory.upload(weight), EPSILON)
    per_layer_inputs(program, tensor, norm, activation(recording, table, extent), 4.0)
    program.run()
    expected = per_layer_inputs_reference(projected, weight, EPSILON, table, 4.0)
    expected[IN_USE:] = projected[IN_USE:]
    return compare(recording.memory.read(tensor), expected, rtol=4e-6, atol=1e-5)


def check_per_layer_gate(
    recording: Recording, backward: bool, dtype: str, name: str = "gelu_tanh"
) -> Comparison:
    """As of the gated activation: tanh is good to some ulp. What the forward gave comes again."""
    if dtype == "f16":
        needs_half(recording)
    gate, d_y = (rounded(2 * normal(seed, ROWS, 20), dtype) for seed in (12, 13))
    inputs = rounded(normal(14, ROWS, 60), dtype)
    extent, program = extent_in_use(recording, ROWS, IN_USE), Program(recording)
    gates, own, d = (typed(recording, values, dtype, extent) for values in (gate, inputs, d_y))
    gated = typed_marked(recording, dtype, extent, 20)
    found = [(gated, per_layer_gate_reference(gate, inputs, 20, name), np.full_like(gate, MARKER))]
    if backward:
        per_layer_gate_backward(program, gates, own, 20, name, d, gated=gated)
        d_gate = per_layer_gate_backward_reference(gate, inputs, 20, name, d_y)
        found.append((gates, d_gate, gate))
    else:
        per_layer_gate(program, gates, own, 20, name, gated)
    program.run()
    results = [(recording.memory.read(tensor), *rest) for tensor, *rest in found]
    return worst(
        *(compare(result[:IN_USE], expected[:IN_USE], rtol=4e-6, atol=2e-5)
          for result, expected, _ in results),
        *(same(result[IN_USE:], before[IN_USE:]) for result, _, before in results),
    )  # fmt: skip


def check_scale_rows(recording: Recording, placed: bool, dtype: str) -> Comparison:
    """One product, rounded once."""
    if dtype == "f16":
        needs_half(recording)
    x, factors = rounded(normal(4, ROWS, 36), dtype), 1 + np.abs(normal(5, 40))
    positions = np.random.default_rng(6).integers(0, 40, ROWS).astype(np.uint32)
    extent, program = extent_in_use(recording, ROWS, IN_USE), Program(recording)
    tensor = typed(recording, x, dtype, extent)
    where = activation(recording, positions, extent) if placed else None
    scale_rows(program, tensor, recording.memory.upload(factors), where, n_columns=20)
    program.run()
    expected = x.astype(np.float64)
    expected[:IN_USE, :20] *= factors[positions[:IN_USE], None] if placed else factors[0]
    return compare(recording.memory.read(tensor), expected, rtol=1e-6)


CHECKS = [
    *(
        Check("span_norm", f"{ROWS}x100 {name} {dtype}",
              partial(check_span_norm, spans=spans, dtype=dtype))
        for name, spans, dtype in (
            ("whole", WHOLE, "f32"), ("heads", HEADS, "f16"), ("apart", APART, "f32"),
        )
    ),
    Check("span_norm_backward", f"{ROWS}x100 in place f32",
          partial(check_span_norm_backward, spans=WHOLE, dtype="f32", in_place=True)),
    Check("span_norm_backward", f"{ROWS}x100 heads f32",
          partial(check_span_norm_backward, spans=HEADS, dtype="f32", in_place=False)),
    Check("scale_rows", f"{ROWS}x36 positions f32",
          partial(check_scale_rows, placed=True, dtype="f32")),
    Check("copy_columns", f"{ROWS}x20 f32",
          partial(check_copy_columns, accumulate=True, dtype="f32")),
    Check("copy_columns", f"{ROWS}x20 f16",
          partial(check_copy_columns, accumulate=False, dtype="f16")),
    Check("per_layer_inputs", f"{ROWS}x60 f32", partial(check_per_layer_inputs, dtype="f32")),
    Check("per_layer_gate", f"{ROWS}x20 f32",
          partial(check_per_layer_gate, backward=False, dtype="f32")),
    Check("per_layer_gate_backward", f"{ROWS}x20 f32",
          partial(check_per_layer_gate, backward=True, dtype="f32")),
    Check("scale_rows", f"{ROWS}x36 f16", partial(check_scale_rows, placed=False, dtype="f16")),
]  # fmt: skip
