"""Norms, the heads' among them, and the cross-entropy: kernels of which a workgroup has a row."""

from __future__ import annotations

from functools import partial

import numpy as np

from lora.backward.head_norm_rope import head_norm_rope_backward
from lora.backward.rmsnorm import picked_rmsnorm_backward, rmsnorm_backward
from lora.checks.comparison import Check, Comparison, compare, needs_half, same, untouched, worst
from lora.checks.references.cross_entropy import gradient_reference, losses_reference
from lora.checks.references.gather import gather_backward_reference
from lora.checks.references.head_norm_rope import (
    HeadLayout,
    head_norm_rope_backward_reference,
    head_norm_rope_reference,
)
from lora.checks.references.matmul import error_bound
from lora.checks.references.rmsnorm import (
    rmsnorm_backward_reference,
    rmsnorm_reference,
    scaled_rows,
)
from lora.checks.tensors import (
    activation,
    extent_in_use,
    marked,
    normal,
    rounded,
    typed,
    typed_marked,
)
from lora.forward.cross_entropy import Objective, cross_entropy, gradient_in_blocks
from lora.forward.head_norm_rope import head_norm_rope
from lora.forward.heads import Heads, Rotation
from lora.forward.model.factors import LoraFactors
from lora.forward.model.inputs import NO_ROW
from lora.forward.model.norm import HeadNorms, Norm
from lora.forward.model.rope_frequencies import Rope
from lora.forward.part_product import SizedRows
from lora.forward.rmsnorm import LowRank, rmsnorm
from lora.shaders.program import Program
from lora.shaders.recording import Recording

ROWS, IN_USE, EPSILON = 19, 18, 1e-5


def check_rmsnorm(recording: Recording, width: int, dtype: str, sized: bool = False) -> Comparison:
    """A sum of squares in a tree; the sum with the residual is rounded at up to 8.

    With `sized` its rows are scaled on their way into f16: at most 32 then, rounded to 2^-11.
    """
    if dtype == "f16" or sized:
        needs_half(recording)
    x, weight, past = (
        rounded(normal(1, ROWS, width), dtype),
        normal(2, width),
        normal(3, ROWS, width),
    )
    extent, program = extent_in_use(recording, ROWS, IN_USE), Program(recording)
    out = typed_marked(recording, "f16" if sized else dtype, extent, width)
    sizes = recording.memory.upload(np.full(ROWS, 7, np.uint32)) if sized else None
    rmsnorm(
        program, typed(recording, x, dtype, extent), Norm(recording.memory.upload(weight), EPSILON),
        residual=activation(recording, past, extent), out=out, sizes=sizes,
    )  # fmt: skip
    program.run()
    result, expected = recording.memory.read(out), rmsnorm_reference(x, weight, EPSILON) + past
    if sizes is not None:
        largest = recording.memory.read(sizes)[:IN_USE].view(np.float32)
        wanted = np.abs(expected[:IN_USE]).max(axis=1)
        powers = 2.0 ** (4 - np.floor(np.log2(largest.astype(np.float64))))
        scaled = powers[:, None] * expected[:IN_USE]
        return worst(
            compare(largest, wanted, rtol=2e-6, atol=2e-6),
            compare(result[:IN_USE], scaled, rtol=2.0**-10, atol=1e-4),
            untouched(result[IN_USE:]),
        )
    return worst(
        compare(result[:IN_USE], expected[:IN_USE], rtol=2e-6, atol=2e-6),
        untouched(result[IN_USE:]),
    )


def check_rmsnorm_backward(
    recording: Recording, width: int, dtype: str, copied: bool = False
) -> Comparison:
    """Two sums of `width` terms, then a difference of numbers of about |d_y| rstd.

    What the norm gave is written again, as good as in the forward, and sizes of rows of f32;
    `copied` says whether their copy in f16 is, which is those rows rounded up or down.
    """
    if dtype == "f16" or copied:
        needs_half(recording)
    x, d_y, past = (rounded(normal(seed, ROWS, width), dtype) for seed in (4, 5, 6))
    weight, extent = normal(7, width), extent_in_use(recording, ROWS, IN_USE)
    out, program = typed(recording, past, dtype, extent), Program(recording)  # in place
    again = typed_marked(recording, dtype, extent, width)
    sizes = recording.memory.upload(np.full(ROWS, 7, np.uint32))
    halves = typed_marked(recording, "f16", extent, width) if copied else None
    rmsnorm_backward(
        program, typed(recording, x, dtype, extent), Norm(recording.memory.upload(weight), EPSILON),
        typed(recording, d_y, dtype, extent), residual=out,
        out=SizedRows(out, sizes if dtype == "f32" else None, halves), normed=again,
    )  # fmt: skip
    program.run()
    result, normed = (recording.memory.read(tensor) for tensor in (out, again))
    expected = rmsnorm_backward_reference(x, weight, d_y, EPSILON) + past
    given = rmsnorm_reference(x, weight, EPSILON)
    largest = np.full(ROWS, 7, np.uint32)
    if dtype == "f32":
        largest[:IN_USE] = np.abs(result[:IN_USE]).max(axis=1).view(np.uint32)
    found = []
    if halves is not None:
        copy = recording.memory.read(halves)
        rows = scaled_rows(result[:IN_USE])
        found = [
            compare(copy[:IN_USE], rows, rtol=2.0**-10, atol=2.0**-24),
            untouched(copy[IN_USE:]),
        ]
    return worst(
        *found,
        same(recording.memory.read(sizes), largest),
        compare(result[:IN_USE], expected[:IN_USE], rtol=1e-5, atol=3e-6),
        same(result[IN_USE:], past[IN_USE:]),
        compare(normed[:IN_USE], given[:IN_USE], rtol=2e-6, atol=2e-6),
        untouched(normed[IN_USE:]),
    )


def check_picked_rmsnorm_backward(recording: Recording, width: int) -> Comparison:
    """As that, of rows of which the norm was given some alone; others get zeros."""
    picked = np.arange(0, IN_USE, 3)
    n, slots = len(picked), np.full(ROWS, NO_ROW, np.uint32)
    slots[picked] = np.arange(n)
    x, d_y, weight = normal(4, n, width), normal(5, n, width), normal(7, width)
    targets, extent = extent_in_use(recording, n, n), extent_in_use(recording, ROWS, IN_USE)
    out, program = marked(recording, extent, width), Program(recording)
    sizes = recording.memory.upload(np.full(ROWS, 7, np.uint32))
    picked_rmsnorm_backward(
        program, activation(recording, x, targets),
        Norm(recording.memory.upload(weight), EPSILON), activation(recording, d_y, targets),
        activation(recording, slots, extent), SizedRows(out, sizes),
    )  # fmt: skip
    program.run()
    result = recording.memory.read(out)
    d_picked = rmsnorm_backward_reference(x, weight, d_y, EPSILON)
    expected = gather_backward_reference(d_picked, picked, ROWS)
    largest = np.abs(result).max(axis=1).view(np.uint32)
    return worst(
        compare(result[:IN_USE], expected[:IN_USE], rtol=1e-5, atol=3e-6),
        untouched(result[IN_USE:]),
        same(recording.memory.read(sizes)[:IN_USE], largest[:IN_USE]),
    )


def check_head_norm_rope(recording: Recording, layout: HeadLayout, backward: bool) -> Comparison:
    """As the norm and the rotation, one after the other."""
    qkv, d_y = normal(8, ROWS, layout.width), normal(9, ROWS, layout.width)
    weights = normal(10, layout.head_size), normal(11, layout.head_size)
    positions = np.arange(ROWS) * 61
    extent, program = extent_in_use(recording, ROWS, IN_USE), Program(recording)
    tables = Rope(layout.base, layout.dimensions, layout.interleaved).tables(2000)
    x, (q_weight, k_weight) = (
        activation(recording, qkv, extent),
        map(recording.memory.upload, weights),
    )
    norms = HeadNorms(Norm(q_weight, layout.epsilon), Norm(k_weight, layout.epsilon))
    rotation = Rotation(
        activation(recording, positions, extent), recording.memory.upload(tables),
        layout.interleaved,
    )  # fmt: skip
    heads = Heads(layout.n_heads, layout.n_kv_heads, layout.head_size, scale=1.0)
    if backward:
        out = activation(recording, d_y, extent)
        head_norm_rope_backward(program, x, norms, rotation, heads, out)
        expected = head_norm_rope_backward_reference(qkv, *weights, d_y, positions, layout)
    else:
        out = marked(recording, extent, layout.width)
        head_norm_rope(program, x, norms, rotation, heads, out=out)
        expected = head_norm_rope_reference(qkv, *weights, positions, layout)
    program.run()
    result = recording.memory.read(out)
    if backward:
        return worst(
            compare(result[:IN_USE], expected[:IN_USE], rtol=1e-5, atol=1e-5),
            same(result[IN_USE:], d_y[IN_USE:]),
        )
    return worst(
        compare(result[:IN_USE], expected[:IN_USE], rtol=2e-6, atol=4e-6),
        untouched(result[IN_USE:]),
    )


def check_low_rank(recording: Recording) -> Comparison:
    """z that a norm writes beside what it gives: sums of products in f32."""
    x, weight, a = normal(1, ROWS, 576), normal(2, 576), normal(3, 20, 576)
    extent, program = extent_in_use(recording, ROWS, IN_USE), Program(recording)
    factor = recording.memory.upload(a)
    z = typed_marked(recording, "f32", extent, 20)
    y = rmsnorm(
        program, activation(recording, x, extent), Norm(recording.memory.upload(weight), EPSILON),
        low=LowRank(LoraFactors(factor, factor, 20, 1.0, ((0, 4),)), z),
    )  # fmt: skip
    program.run()
    given, found = recording.memory.read(y)[:IN_USE].astype(np.float64), recording.memory.read(z)
    bound = 4 * error_bound(np.abs(given) @ np.abs(a).T, 576)
    return worst(compare(found[:IN_USE], given @ a.T, bound=bound), untouched(found[IN_USE:]))


def check_cross_entropy(recording: Recording, vocab_size: int, halves: bool = False) -> Comparison:
    """A loss is a difference of numbers up to 80, which f32 holds to 4e-6.

    With `halves` the gradient is f16, in blocks: 2^-10 of it, and what is below f16's numbers.
    """
    logits, labels = 5 * normal(12, 5, vocab_size), np.arange(5) * 7 % vocab_size
    logits[0, :4] = 80.0, -80.0, 80.0, 80.0  # a tie: the lowest index is the argmax
    stored = np.full((5, -(-vocab_size // 8) * 8), 100.0, np.float32)  # padded to whole vectors
    stored[:, :vocab_size] = logits
    extent, program = extent_in_use(recording, 5, 4), Program(recording)
    tensor = activation(recording, stored, extent)
    losses, correct = marked(recording, extent), marked(recording, extent)
    weights = normal(13, 5)
    objective = Objective(activation(recording, weights, extent), halves=halves)
    cross_entropy(
        program, tensor, activation(recording, labels, extent), losses, correct, objective,
        vocab_size=vocab_size,
    )  # fmt: skip
    program.run()
    gradient, found, right = (
        recording.memory.read(tensor),
        recording.memory.read(losses),
        recording.memory.read(correct),
    )
    is_right = (logits.argmax(axis=1) == labels).astype(np.float64)
    expected = gradient_reference(logits, labels, weights)
    rtol, atol = 2e-5, 2.0**-23
    if halves:
        rtol, atol, column = 2.0**-10, 2.0**-14, np.arange(stored.shape[1])
        of_halves = gradient_in_blocks(tensor)
        places = column + column // of_halves.block * of_halves.block
        gradient[:4] = recording.memory.read(of_halves.tensor)[:4, places]
        stored[:4, vocab_size:] = 0.0
    return worst(
        compare(found[:4], losses_reference(logits, labels)[:4], rtol=2e-6, atol=1e-5),
        compare(gradient[:4, :vocab_size], expected[:4], rtol=rtol, atol=atol),
        same(right[:4], is_right[:4]),
        same(gradient[4:], stored[4:]),
        same(gradient[:, vocab_size:], stored[:, vocab_size:]),
        untouched(found[4:]),
    )


LAYOUTS = (HeadLayout(4, 2, 64, 64, False), HeadLayout(3, 1, 100, 52, True))
CHECKS = [
    *(
        Check(name, f"{ROWS}x{width} {dtype}", partial(run, width=width, dtype=dtype), as_cpu)
        for name, run in (("rmsnorm", check_rmsnorm), ("rmsnorm_backward", check_rmsnorm_backward))
        for width, dtype, as_cpu in (
            (100, "f32", True), (576, "f32", False), (2052, "f32", False), (100, "f16", False),
        )
    ),
    Check("rmsnorm_backward", f"{ROWS}x576 with a copy in f16",
          partial(check_rmsnorm_backward, width=576, dtype="f32", copied=True)),
    Check("rmsnorm", f"{ROWS}x576 of rows that are scaled",
          partial(check_rmsnorm, width=576, dtype="f32", sized=True)),
    Check("rmsnorm", f"{ROWS}x576 with z", check_low_rank),
    *(
        Check("rmsnorm_backward", f"{ROWS}x{width} of picked rows",
              partial(check_picked_rmsnorm_backward, width=width), as_cpu)
        for width, as_cpu in ((100, True), (576, False))
    ),
    *(
        Check("head_norm_rope" + "_backward" * backward,
              f"{ROWS}x{layout.width} heads of {layout.head_size}",
              partial(check_head_norm_rope, layout=layout, backward=backward), as_cpu)
        for backward in (False, True)
        for layout, as_cpu in zip(LAYOUTS, (False, True), strict=True)
    ),
    *(
        Check("cross_entropy", f"5x{vocab_size}",
              partial(check_cross_entropy, vocab_size=vocab_size), as_cpu)
        for vocab_size, as_cpu in ((101, True), (101, False), (16391, False))
    ),
    Check("cross_entropy", "5x16390 f16",
          partial(check_cross_entropy, vocab_size=16390, halves=True)),
]  # fmt: skip
