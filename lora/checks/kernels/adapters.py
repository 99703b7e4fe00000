"""The low-rank projection, its gradients, and the optimizer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from lora.backward.lora import (
    SCALED_BUFFERS,
    GroupGradients,
    ScaledGradient,
    plan_gradients,
    plan_project_gradient,
)
from lora.backward.lora_pending import STORAGE_BUFFERS, PendingGradients, gradients_wait
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
from lora.checks.references.lora import gradients_reference
from lora.checks.references.matmul import error_bound
from lora.checks.references.optim import (
    BETAS,
    EPSILON,
    AdamWReference,
    GuardReference,
    clip_reference,
)
from lora.checks.references.rmsnorm import scaled_halves
from lora.checks.tensors import (
    MARKER,
    activation,
    extent_in_use,
    normal,
    rounded,
    typed,
    typed_marked,
)
from lora.forward.dropout import GroupDropout, mask, row_keys, scale_of
from lora.forward.lora import lora_project
from lora.forward.lora_matrix import gradient_cut
from lora.forward.matmul_matrix import shape_on
from lora.forward.model.factors import LoraFactors
from lora.forward.part_product import SizedRows
from lora.optim.adamw import AdamWSettings, AdamWTensors, adamw, step_words
from lora.optim.clipping import gradient_norm
from lora.optim.guard import METRICS, STATE_AT, GuardState, Scaling, scaled_weight, step_guard
from lora.shaders.program import Program
from lora.shaders.recording import Recording

ROWS, IN_USE, IN_FEATURES, RANK, SCALE = 37, 35, 260, 8, 1.7
RANGES, KEYS = ((0, 132), (140, 152)), (11, 12)
N_B, OUT_FEATURES = 144, 160  # rows of B; columns of y, of which not all are adapted


def factors_on(recording: Recording, a: np.ndarray, b: np.ndarray) -> LoraFactors:
    """A, B and magnitudes of 0 behind each other in one buffer, on multiples of 64 elements."""
    first = -(-a.size // 64) * 64
    last = first + -(-b.size // 64) * 64
    flat = np.full(last + len(b), MARKER, np.float32)
    flat[: a.size], flat[first : first + b.size] = a.reshape(-1), b.reshape(-1)
    flat[last:] = 0.0
    tensor = recording.memory.upload(flat)
    return LoraFactors(
        tensor.slice(0, a.size).reshape(*a.shape),
        tensor.slice(first, first + b.size).reshape(*b.shape),
        RANK, SCALE, RANGES, magnitude=tensor.slice(last, flat.size),
    )  # fmt: skip


def check_matrix(
    recording: Recording,
    waiting: bool = False,
    dropped: float = 0.0,
    scaled: bool = False,
    copied: bool = False,
    in_features: int = IN_FEATURES,
) -> Comparison:
    """The same on matrix units."""
    if shape_on(recording.facts) is None:
        raise NotHereError("no matrix units that multiply f16 and add f32")
    spare_software(recording)
    on_units = replace(recording, precision="f16", body="matrix")
    if gradient_cut(on_units, (2 * RANK, RANK)) is None:
        raise NotHereError("its matrix units, or its workgroups, are too small")
    if scaled and on_units.facts.most_storage_buffers < SCALED_BUFFERS:
        raise NotHereError(f"a kernel has fewer than {SCALED_BUFFERS} storage buffers")
    return check_lora(on_units, "f16", waiting, dropped, scaled, copied, in_features)


def _reference(
    x: np.ndarray, d_y: np.ndarray, a: np.ndarray, b: np.ndarray, keys: np.ndarray, dropped: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """z, d_z, d_A and d_B, with dropout of x before each member, in float64."""
    found, row = [], 0
    for member, (start, stop) in enumerate(RANGES):
        low, of_b = slice(member * RANK, (member + 1) * RANK), slice(row, row + stop - start)
        left = x.astype(np.float64)
        if dropped:
            left *= mask(keys, KEYS[member], x.shape[1], dropped) * scale_of(dropped)
        ranges = [(0, stop - start)]
        d = gradients_reference(left, d_y[:, start:stop], a[low], b[of_b], ranges, SCALE)
        found.append((left @ a[low].T, *d))
        row += stop - start
    z, d_z, d_a, d_b = zip(*found, strict=True)
    return np.hstack(z), np.hstack(d_z), np.vstack(d_a), np.vstack(d_b)


def check_lora(
    recording: Recording,
    dtype: str,
    waiting: bool = False,
    dropped: float = 0.0,
    scaled: bool = False,
    copied: bool = False,
    in_features: int = IN_FEATURES,
) -> Comparison:
    """z, d_z, d_A and d_B: sums of products, each addition rounded to 2^-24 of the sum so far.

    With `waiting` d_A and d_B in one dispatch with a d_z; with dropout of this probability; with
    columns of d_y `scaled` by powers of two, and the gradient of magnitudes; of d_y in f32 that is
    `copied` into f16, its rows scaled.

    On matrix units factors are f16, here numbers that f16 has; in the sums over rows z and d_z are
    rounded to 2^-12, independently: the worst of thousands is off by four standard deviations.
    """
    on_units = recording.body == "matrix"
    if dtype == "f16":
        needs_half(recording)
    if waiting and not gradients_wait(recording):
        raise NotHereError(f"a kernel has fewer than {STORAGE_BUFFERS} storage buffers")
    x, d_y = (
        rounded(normal(seed, ROWS, n), dtype) for seed, n in ((1, in_features), (2, OUT_FEATURES))
    )
    kept = "f16" if on_units else "f32"
    a, b = rounded(normal(3, 2 * RANK, in_features), kept), rounded(normal(4, N_B, RANK), kept)
    extent, program = extent_in_use(recording, ROWS, IN_USE), Program(recording)
    lora = factors_on(recording, a, b)
    slices = [factors_on(recording, np.zeros_like(a), np.zeros_like(b)) for _ in range(2)]
    x_t, d_y_t = typed(recording, x, dtype, extent), typed(recording, d_y, dtype, extent)
    z, d_z = (typed_marked(recording, "f32", extent, 2 * RANK) for _ in range(2))
    keys, dropout = row_keys(1, 2, [3, 4], [20, ROWS - 20]), None
    if dropped:
        uniform = recording.memory.constant_uniform(KEYS)
        dropout = GroupDropout(dropped, activation(recording, keys, extent), uniform)
    columns = np.ones((2, OUT_FEATURES), np.float32)
    columns_t, p = None, rounded(normal(5, ROWS, OUT_FEATURES), dtype)
    if scaled:
        columns = 2.0 ** (np.arange(2 * OUT_FEATURES, dtype=np.float32).reshape(2, -1) % 5 - 2)
        vectors = [recording.memory.upload(values) for values in columns]
        columns_t = ScaledGradient(typed(recording, p, dtype, extent), *vectors)
    scales = None if columns_t is None else columns_t.scales
    given = SizedRows(d_y_t, None)
    if copied:
        largest = recording.memory.upload(np.abs(d_y).max(axis=1).view(np.uint32))
        halves = typed(recording, scaled_halves(d_y).astype(np.float32), "f16", extent)
        given = SizedRows(typed(recording, d_y, "f32", extent), largest, halves)
    lora_project(program, x_t, lora, out=z, dropout=dropout)
    plan_project_gradient(recording, given, lora, d_z, scales=scales).append(program)
    group = GroupGradients(x_t, z, given, d_z, lora, slices, dropout, columns_t)
    if waiting:
        pending = PendingGradients()
        pending.add(program, group)
        d_z = typed_marked(recording, "f32", extent, 2 * RANK)
        pending.project(program, given, lora, d_z, scales)
        pending.flush(program)
    else:
        plan_gradients(recording, group).append(program)
    program.run()
    used = slice(0, IN_USE)
    products = scaled * d_y[used].astype(np.float64) * p[used]
    d_m, d_m_size = (
        (columns[1] * values.sum(0))[np.r_[0:132, 140:152]]
        for values in (products, np.abs(products))
    )
    d_y = columns[0] * d_y
    x_size, d_y_size, a_size, b_size = (np.abs(v) for v in (x[used], d_y[used], a, b))
    z_expected, *expected = _reference(x[used], d_y[used], a, b, keys[used], dropped)
    z_size, *sizes = _reference(x_size, d_y_size, a_size, b_size, keys[used], dropped)
    terms = (132, IN_USE + 132, IN_USE + in_features)
    factor = 16 if on_units else 4  # units truncate sums; as in their kernels' tests
    bounds = [factor * error_bound(size, n) for size, n in zip(sizes, terms, strict=True)]
    z_bound = factor * error_bound(z_size, in_features)
    if on_units:
        bounds = [
            bound + (4 * 2.0**-11 * size / IN_USE**0.5 if of_rows else 0.0)
            for bound, size, of_rows in zip(bounds, sizes, (False, True, True), strict=True)
        ]
    z_found, d_z_found = recording.memory.read(z), recording.memory.read(d_z)
    d_a = sum(recording.memory.read(s.a).astype(np.float64) for s in slices)
    d_b = sum(recording.memory.read(s.b).astype(np.float64) for s in slices)
    d_m_found = sum(recording.memory.read(s.magnitude) for s in slices if s.magnitude)
    return worst(
        compare(np.asarray(d_m_found), d_m, bound=4 * error_bound(d_m_size, IN_USE) + 1e-30),
        compare(z_found[used], z_expected, bound=z_bound),
        compare(d_z_found[used], expected[0], bound=bounds[0]),
        compare(np.asarray(d_a), expected[1], bound=bounds[1]),
        compare(np.asarray(d_b), expected[2], bound=bounds[2]),
        untouched(z_found[IN_USE:]),
        untouched(d_z_found[IN_USE:]),
    )


def check_gradient_norm(recording: Recording, n_slices: int) -> Comparison:
    """The slices' sum, exactly as f32 adds them in order; the norm to some roundings of 2^-24."""
    slices = [normal(seed, 65_600) for seed in range(n_slices)]
    tensors, state, program = (
        [recording.memory.upload(s) for s in slices],
        recording.memory.empty((4,)),
        Program(recording),
    )
    gradient_norm(program, tensors, state, max_norm=1.0)
    program.run()
    total = slices[0]
    for values in slices[1:]:
        total = total + values
    expected = np.array([*clip_reference(total, 1.0), 1.0, 0.0])
    return worst(
        same(recording.memory.read(tensors[0]), total.astype(np.float64)),
        compare(recording.memory.read(state), expected, rtol=1e-6),
    )


def check_adamw(recording: Recording) -> Comparison:
    """Three steps; each moves a parameter by a few learning rates, to about 1e-5 of itself."""
    n, rate = 5056, 1e-3
    start = normal(20, n)
    p, m, v, gradient = (recording.memory.upload(x) for x in (start, *np.zeros((3, n), np.float32)))
    state, words, program = (
        recording.memory.empty((4,)),
        recording.memory.uniform(),
        Program(recording),
    )
    gradient_norm(program, [gradient], state, max_norm=1.0)
    settings = AdamWSettings(BETAS, EPSILON, weight_decay=0.1)
    adamw(program, AdamWTensors(p, gradient, m, v), state, words, settings)
    reference = AdamWReference(start, 0.1)
    for t in range(1, 4):
        values = normal(20 + t, n)
        recording.memory.write(gradient, values)
        recording.memory.write(words, step_words(rate, t, BETAS))
        program.run()
        reference.step(values * clip_reference(values, 1.0)[1], rate)
    return worst(
        compare(recording.memory.read(p), reference.p, rtol=1e-6, atol=2e-8),
        compare(recording.memory.read(m), reference.m, rtol=2e-6, atol=1e-7),
        compare(recording.memory.read(v), reference.v, rtol=2e-5, atol=1e-9),
    )


def check_step_guard(recording: Recording, scaled: bool) -> Comparison:
    """Steps of which some are no numbers: exact, but for the norm and the factor."""
    scaling = Scaling(begin=8.0, growth_interval=2, least=4.0, most=16.0) if scaled else None
    metrics, program = recording.memory.empty((METRICS,)), Program(recording)
    weight, scaled_by = recording.memory.uniform(), recording.memory.empty((4,))
    if scaling is not None:
        scaled_weight(program, metrics, weight, scaled_by, scaling)
    step_guard(program, metrics, scaling=scaling, max_norm=1.0)
    limits = None if scaling is None else (8.0, 2, 4.0, 16.0)
    reference = GuardReference(limits, GuardState.MOST_IN_A_ROW)
    values = np.zeros(METRICS, np.float32)
    GuardState(scale=reference.scale, first_scale=reference.first).put_into(values)
    found = [Comparison(0.0, 0.0)]
    nan, infinite = float("nan"), float("inf")
    losses = [1.0, 2.0, nan, 1.0, infinite, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    norms = [24.0, 0.5, 3.0, 9.0, 1.0, infinite, 2.0, 3.0, nan, nan, infinite]
    for step, (loss, norm) in enumerate((*zip(losses, norms, strict=True), (1.0, 1.0))):
        # What is held is run again one step later, so that one comes between.
        again = scaling is not None and reference.held and step % 2 == 1
        words = np.array([1.0, float(again), 0.0, 0.0], np.float32)
        recording.memory.write(weight, words.view(np.uint32))
        if scaling is not None:
            reference.begin(again)
        finite = float(np.isfinite(norm))
        values[0], values[STATE_AT : STATE_AT + 4] = loss, (norm, norm, finite, 0.0)
        if scaling is None and finite:  # as gradient_norm leaves it
            values[STATE_AT + 1] = min(1.0, 1.0 / (norm + 1e-6))
        recording.memory.write(metrics, values)
        program.run()
        values = recording.memory.read(metrics)
        expected = np.array(reference.step(loss, norm, 1.0))
        state = values[STATE_AT : STATE_AT + 11]
        found.append(same(state[2:], expected[2:]))
        if finite:
            found.append(compare(state[:2], expected[:2], rtol=1e-6))
    return worst(*found)


def check_scaled_weight(recording: Recording) -> Comparison:
    """A power of two apart: exact; what is held is so until it is begun again."""
    weight, metrics = recording.memory.uniform(), recording.memory.empty((METRICS,))
    scaled, program = recording.memory.empty((4,)), Program(recording)
    scaled_weight(program, metrics, weight, scaled, Scaling(1024.0))
    found = []
    for again, held in ((False, False), (False, True), (True, True), (True, False)):
        values = np.zeros(METRICS, np.float32)
        before = GuardState(64.0, 5, 1, 2, 3, held, 512.0)
        before.put_into(values)
        recording.memory.write(metrics, values)
        words = np.array([1024 / 77, float(again), 0.0, 0.0], np.float32)
        recording.memory.write(weight, words.view(np.uint32))
        program.run()
        found.append(same(recording.memory.read(scaled)[:1], words[:1] / 16))
        wanted = replace(before, held=held and not again)
        if not (again or held):
            wanted = replace(before, overflows=0, first_scale=64.0)
        wanted.put_into(values)
        found.append(same(recording.memory.read(metrics), values))
    return worst(*found)


CHECKS = [
    *(
        Check("lora", f"{ROWS}x{IN_FEATURES} rank {RANK} {dtype}",
              partial(check_lora, dtype=dtype), as_cpu)
        for dtype, as_cpu in (("f32", True), ("f32", False), ("f16", False))
    ),
    Check("lora_backward", f"{ROWS}x{IN_FEATURES} rank {RANK}",
          partial(check_lora, dtype="f32", waiting=True)),
    Check("lora_matrix", f"{ROWS}x{IN_FEATURES} rank {RANK}", check_matrix),
    Check("lora_backward_matrix", f"{ROWS}x{IN_FEATURES} rank {RANK}",
          partial(check_matrix, waiting=True)),
    Check("lora_matrix", f"scaled columns, {ROWS}x{IN_FEATURES} rank {RANK}",
          partial(check_matrix, scaled=True)),
    Check("lora_backward_matrix", f"scaled columns, {ROWS}x{IN_FEATURES} rank {RANK}",
          partial(check_matrix, waiting=True, scaled=True)),
    Check("lora_matrix", f"dropout, {ROWS}x{IN_FEATURES} rank {RANK}",
          partial(check_matrix, dropped=0.25)),
    Check("lora_backward_matrix", f"dropout, {ROWS}x{IN_FEATURES} rank {RANK}",
          partial(check_matrix, waiting=True, dropped=0.25)),
    Check("lora_backward_matrix", f"dropout of eights, {ROWS}x{IN_FEATURES + 4} rank {RANK}",
          partial(check_matrix, waiting=True, dropped=0.25, in_features=IN_FEATURES + 4)),
    Check("lora_matrix", f"rows that are scaled, {ROWS}x{IN_FEATURES} rank {RANK}",
          partial(check_matrix, copied=True)),
    Check("lora_backward_matrix", f"rows that are scaled, {ROWS}x{IN_FEATURES} rank {RANK}",
          partial(check_matrix, waiting=True, copied=True)),
    Check("gradient_norm", "1x65600", partial(check_gradient_norm, n_slices=1), as_cpu=True),
    Check("gradient_norm", "4x65600", partial(check_gradient_norm, n_slices=4)),
    Check("step_guard", "12 steps", partial(check_step_guard, scaled=False)),
    Check("step_guard", "12 steps, scaled", partial(check_step_guard, scaled=True)),
    Check("scaled_weight", "1", check_scaled_weight),
    Check("adamw", "5056", check_adamw),
]  # fmt: skip
