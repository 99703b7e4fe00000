"""Kernels of the gated delta rule."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from lora.backward.gated_delta import (
    KEY,
    QUERY,
    VALUE,
    DeltaGradients,
    delta_gates_backward,
    gated_delta_backward,
)
from lora.backward.head_gate import head_gate_backward
from lora.checks.comparison import (
    Check,
    Comparison,
    NotHereError,
    compare,
    needs_half,
    same,
    spare_software,
    untouched,
    worst,
)
from lora.checks.references.gated_delta import (
    DeltaInputs,
    delta_gates_backward_reference,
    delta_gates_reference,
    gated_delta_backward_reference,
    gated_delta_reference,
)
from lora.checks.references.head_gate import head_gate_backward_reference, head_gate_reference
from lora.checks.tensors import (
    MARKER,
    activation,
    extent_in_use,
    marked,
    normal,
    rounded,
    typed,
    typed_marked,
)
from lora.forward.delta_matrix import delta_cut
from lora.forward.gated_delta import (
    DeltaSizes,
    DeltaTensors,
    GateWeights,
    chunk_rows,
    delta_gates,
    gated_delta,
    gated_delta_row,
    gated_delta_text,
)
from lora.forward.head_gate import head_gate
from lora.forward.matmul_matrix import shape_on
from lora.shaders.program import Program
from lora.shaders.recording import Recording

SIZES = DeltaSizes(key_heads=2, value_heads=4, head_size=16)
# Examples within a chunk, over some, of a chunk's length, and of one row.
STARTS = (0, 5, 6, 22, 75, 76, 110)
LARGE = DeltaSizes(1, 4, 128), (0, 5, 150, 214, 300)  # heads as Qwen3.5 has them


def random_inputs(sizes: DeltaSizes, starts: tuple[int, ...], seed: int = 0) -> DeltaInputs:
    """Keys of length 1, gates as trained models have them: some forget at once, most do not."""
    rng, rows = np.random.default_rng(seed), starts[-1]
    q, k = rng.normal(size=(2, rows, sizes.key_heads, sizes.head_size))
    v = rng.normal(size=(rows, sizes.value_heads, sizes.head_size))
    g = -np.exp(rng.normal(-1.5, 1.5, (rows, sizes.value_heads)))
    beta = 1 / (1 + np.exp(-rng.normal(size=g.shape)))
    of_rows = np.repeat(starts[:-1], np.diff(starts))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    queries, keys, values = (x.astype(np.float32) for x in (q / sizes.head_size**0.5, k, v))
    gates, betas = g.astype(np.float32), beta.astype(np.float32)
    return DeltaInputs(queries, keys, values, gates, betas, of_rows)


def _packed(x: DeltaInputs, rows: int) -> np.ndarray:
    """f32 [rows, input_size] as `DeltaTensors.inputs` has them; zeros in rows not in use."""
    parts = [part.reshape(len(part), -1) for part in (x.q, x.k, x.v, x.g, x.beta)]
    values = np.concatenate(parts, axis=1)
    return np.concatenate([values, np.zeros((rows - len(values), values.shape[1]))]).astype("f4")


def _tensors(
    recording: Recording, sizes: DeltaSizes, x: DeltaInputs, spare: int = 3
) -> DeltaTensors:
    in_use = len(x.v)
    extent = extent_in_use(recording, in_use + spare, in_use)
    tensors = DeltaTensors.allocate(recording, sizes, extent)
    recording.memory.write(tensors.inputs, _packed(x, in_use + spare))
    for tensor in (tensors.mixes, tensors.deltas, tensors.states):
        recording.memory.write(tensor, np.full(tensor.shape, MARKER, np.float32))
    return tensors


def _segments(recording: Recording, x: DeltaInputs, tensors: DeltaTensors) -> object:
    starts = x.starts
    ends = np.searchsorted(starts, starts, side="right")
    bounds = np.zeros((tensors.inputs.shape[0], 2), np.uint32)
    bounds[: len(starts)] = np.stack([starts, ends], axis=1)
    assert tensors.inputs.extent is not None
    return activation(recording, bounds, tensors.inputs.extent)


def _of_factors(found: np.ndarray, expected: np.ndarray) -> Comparison:
    """What products of f16 factors and f32 sums may be off, each number and all of them together.

    Two factors are off by up to 2^-12 of themselves, and what comes of one product is a factor of
    the next: a number is off by some 2^-11 of its like, the worst of thousands by six times that.
    """
    size = float(np.sqrt(np.mean(expected.astype(np.float64) ** 2)))
    off = float(np.sqrt(np.mean((found - expected) ** 2)))
    return worst(
        Comparison(off if np.isfinite(off) else np.inf, 2**-10 * size),
        compare(found, expected, rtol=2**-9, atol=2**-7 * size),
    )


def check_gated_delta(
    recording: Recording, sizes: DeltaSizes = SIZES, starts: tuple[int, ...] = STARTS
) -> Comparison:
    """Sums over whole examples; the row by row rule in f64 is another order altogether."""
    x = random_inputs(sizes, starts)
    tensors, program = _tensors(recording, sizes, x), Program(recording)
    gated_delta(program, tensors, sizes, _segments(recording, x, tensors))  # type: ignore[arg-type]
    program.run()
    out = recording.memory.read(tensors.deltas)
    expected, _ = gated_delta_reference(x)
    found = out[: len(x.v), : sizes.value_size].reshape(x.v.shape)
    if _cut(recording, sizes) is not None:
        return worst(_of_factors(found, expected), untouched(out[len(x.v) :]))
    return worst(compare(found, expected, rtol=1e-5, atol=1e-5), untouched(out[len(x.v) :]))


def check_gated_delta_backward(
    recording: Recording, sizes: DeltaSizes = SIZES, starts: tuple[int, ...] = STARTS
) -> Comparison:
    """As of the forward, with sums of up to twenty times the terms."""
    x, program = random_inputs(sizes, starts), Program(recording)
    tensors, in_use = _tensors(recording, sizes, x), len(x.v)
    segments = _segments(recording, x, tensors)
    gradients = DeltaGradients.allocate(recording, sizes, tensors.inputs.extent)  # type: ignore[arg-type]
    d_o = normal(9, *x.v.shape)
    given = np.full(gradients.d_deltas.shape, MARKER, np.float32)
    given[:in_use, : sizes.value_size] = d_o.reshape(in_use, -1)
    recording.memory.write(gradients.d_deltas, given)
    for tensor in (gradients.d_states, gradients.d_gates):
        recording.memory.write(tensor, np.full(tensor.shape, MARKER, np.float32))
    gated_delta(program, tensors, sizes, segments)  # type: ignore[arg-type]
    gated_delta_backward(program, tensors, sizes, segments, gradients)  # type: ignore[arg-type]
    program.run()
    expected = gated_delta_backward_reference(x, d_o)
    result, gates = (recording.memory.read(t) for t in (gradients.d_deltas, gradients.d_gates))
    parts = result[:in_use].reshape(in_use, 7, sizes.value_heads, sizes.head_size)
    pairs = [
        (parts[:, QUERY], expected.q), (parts[:, KEY], expected.k), (parts[:, VALUE], expected.v),
        (gates[:in_use, : sizes.value_heads], expected.g),
        (gates[:in_use, sizes.value_heads :], expected.beta),
    ]  # fmt: skip
    on_units = _cut(recording, sizes) is not None
    return worst(
        *(
            _of_factors(found, wanted) if on_units else compare(found, wanted, rtol=2e-5, atol=4e-5)
            for found, wanted in pairs
        ),
        untouched(result[in_use:, sizes.value_size :]),
        untouched(gates[in_use:]),
    )


def _cut(recording: Recording, sizes: DeltaSizes) -> object:
    """Whether the rule is computed on matrix units, or in plain WGSL as they would."""
    return delta_cut(recording, chunk_rows(recording.facts), sizes.head_size)


def check_on_units(
    recording: Recording, sizes: DeltaSizes, starts: tuple[int, ...], *, backward: bool
) -> Comparison:
    """The same on matrix units."""
    if shape_on(recording.facts) is None:
        raise NotHereError("no matrix units that multiply f16 and add f32")
    spare_software(recording)
    recording = replace(recording, precision="f16", body="matrix")
    if _cut(recording, sizes) is None:
        raise NotHereError(f"too little workgroup memory for heads of {sizes.head_size}")
    return (check_gated_delta_backward if backward else check_gated_delta)(recording, sizes, starts)


def check_large_heads(recording: Recording, backward: bool) -> Comparison:
    """The models' own heads, over several chunks of a GPU."""
    spare_software(recording)
    check = check_gated_delta_backward if backward else check_gated_delta
    return check(recording, *LARGE)


def check_gated_delta_text(
    recording: Recording, sizes: DeltaSizes = SIZES, rows: int = 37, position: int = 9
) -> Comparison:
    """As of `check_gated_delta`, with a state before the rows and one after them."""
    x = random_inputs(sizes, (0, rows))
    tensors, program = _tensors(recording, sizes, x, 0 if rows == 1 else 3), Program(recording)
    before = 0.3 * normal(5, *sizes.state_shape)
    state = recording.memory.upload(before)
    extent = tensors.inputs.extent
    assert extent is not None
    places = np.arange(position, position + extent.maximum, dtype=np.uint32)
    positions = activation(recording, places, extent)
    if rows == 1:
        gated_delta_row(program, tensors.inputs, sizes, positions, state, tensors.deltas)
    else:
        gated_delta_text(program, tensors, sizes, positions, state)
    program.run()
    out, states = gated_delta_reference(x, before if position else None)
    found = recording.memory.read(tensors.deltas)[:rows, : sizes.value_size]
    return worst(
        compare(found.reshape(out.shape), out, rtol=1e-5, atol=1e-5),
        compare(recording.memory.read(state), states, rtol=1e-5, atol=1e-5),
    )


def check_delta_gates(recording: Recording, dtype: str, backward: bool) -> Comparison:
    """A logarithm and exponentials, good to some ulp."""
    if dtype == "f16":
        needs_half(recording)
    heads, first, stride, rows, in_use = SIZES.value_heads, 12, 28, 13, 11
    projected = rounded(3 * normal(1, rows, stride), dtype)
    a, dt = -np.exp(normal(2, heads)), normal(3, heads)
    b, alpha = projected[:, first : first + heads], projected[:, first + heads :][:, :heads]
    extent, program = extent_in_use(recording, rows, in_use), Program(recording)
    weights = GateWeights(recording.memory.upload(a), recording.memory.upload(dt))
    source = typed(recording, projected, dtype, extent)
    if backward:
        d_gates = normal(4, rows, 2 * heads)
        out = typed_marked(recording, dtype, extent, stride)
        given = activation(recording, d_gates, extent)
        delta_gates_backward(program, source, first, weights, SIZES, given, out)
        expected = np.full((rows, stride), MARKER, np.float64)
        found = delta_gates_backward_reference(b, alpha, a, dt, d_gates)
        expected[:in_use, first : first + 2 * heads] = found[:in_use]
    else:
        out = marked(recording, extent, SIZES.input_size)
        delta_gates(program, source, first, weights, SIZES, out)
        expected = np.full((rows, SIZES.input_size), MARKER, np.float64)
        both = np.concatenate(delta_gates_reference(b, alpha, a, dt), axis=1)
        expected[:in_use, SIZES.gates_at :] = both[:in_use]
    program.run()
    result = recording.memory.read(out)
    return worst(
        compare(result[:in_use], expected[:in_use], rtol=4e-6, atol=2e-6),
        same(result[in_use:], expected[in_use:]),
    )


def check_head_gate(recording: Recording, dtype: str, backward: bool) -> Comparison:
    """A quotient of numbers up to five; columns of q are left alone.

    Backward, what the forward gave is written again.
    """
    if dtype == "f16":
        needs_half(recording)
    size, width, stride, rows, in_use = 12, 36, 88, 13, 11
    raw, x, d_y = (rounded(normal(i, rows, n), dtype) for i, n in enumerate((stride, width, width)))
    extent, program = extent_in_use(recording, rows, in_use), Program(recording)
    gates, values, given = (typed(recording, part, dtype, extent) for part in (raw, x, d_y))
    gated = typed_marked(recording, dtype, extent, width)
    expected = head_gate_reference(raw, x, size)

    def of_forward() -> Comparison:
        result = recording.memory.read(gated)
        return worst(
            compare(result[:in_use], expected[:in_use], rtol=2e-6, atol=1e-7),
            untouched(result[in_use:]),
        )

    if not backward:
        head_gate(program, gates, values, size, gated)
        program.run()
        return of_forward()
    out = typed_marked(recording, dtype, extent, stride)
    head_gate_backward(program, gates, values, size, given, out, gated=gated)
    program.run()
    d_x, d_raw = head_gate_backward_reference(raw, x, size, d_y)
    is_gate = head_gate_backward_reference(0 * raw, 1 + 0 * x, size, 1 + 0 * d_y)[1] != 0
    result, d_gates = recording.memory.read(given), recording.memory.read(out)
    of_gates = np.where(is_gate, d_raw, MARKER)
    return worst(
        of_forward(),
        compare(result[:in_use], d_x[:in_use], rtol=2e-6, atol=1e-7),
        same(result[in_use:], d_y[in_use:]),
        compare(d_gates[:in_use], of_gates[:in_use], rtol=4e-6, atol=1e-6),
        untouched(d_gates[in_use:]),
    )


CHECKS = [
    Check("head_gate", "11x36 f32", partial(check_head_gate, dtype="f32", backward=False)),
    Check("head_gate_backward", "11x36 f32",
          partial(check_head_gate, dtype="f32", backward=True)),
    Check("gated_delta", "110x4 heads of 16", check_gated_delta),
    Check("gated_delta", "110x4 heads of 16", check_gated_delta, as_cpu=True),
    Check("gated_delta_backward", "110x4 heads of 16", check_gated_delta_backward),
    Check("gated_delta", "300x4 heads of 128", partial(check_large_heads, backward=False)),
    Check("gated_delta_backward", "300x4 heads of 128", partial(check_large_heads, backward=True)),
    *(
        Check(
            "gated_delta_matrix" + "_backward" * backward,
            f"{starts[-1]}x4 heads of {sizes.head_size}",
            partial(check_on_units, sizes=sizes, starts=starts, backward=backward),
        )
        for sizes, starts in ((SIZES, STARTS), LARGE)
        for backward in (False, True)
    ),
    Check("gated_delta_text", "37x4 heads of 16", check_gated_delta_text),
    Check("gated_delta_row", "1x4 heads of 16", partial(check_gated_delta_text, rows=1)),
    Check("delta_gates", "11x4 f16", partial(check_delta_gates, dtype="f16", backward=False)),
    Check("delta_gates", "11x4 f32", partial(check_delta_gates, dtype="f32", backward=False)),
    Check("delta_gates_backward", "11x4 f32",
          partial(check_delta_gates, dtype="f32", backward=True)),
]  # fmt: skip
