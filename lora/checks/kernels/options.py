"""What options of training bring: dropout's gradient, noise on embeddings, other optimizers."""

from __future__ import annotations

from functools import partial

import numpy as np

from lora.backward.dropout import dropout_input_gradient
from lora.checks.comparison import Check, Comparison, compare, untouched, worst
from lora.checks.kernels.adapters import factors_on
from lora.checks.references.matmul import error_bound
from lora.checks.references.optim import BETAS, EPSILON
from lora.checks.references.other_optimizers import AdamW8Reference, LionReference
from lora.checks.tensors import activation, extent_in_use, normal, typed, typed_marked
from lora.forward.dropout import GroupDropout, mask, row_keys, scale_of
from lora.forward.embedding_noise import EmbeddingNoise, noise
from lora.optim.adamw import AdamWSettings, step_words
from lora.optim.adamw_8bit import Moments8, adamw_8bit
from lora.optim.lion import LionTensors, lion
from lora.shaders.program import Program
from lora.shaders.recording import Recording

ROWS, IN_USE, WIDTH, RANK, KEYS, P = 37, 35, 260, 8, (11, 12), 0.25
N, RATE, DECAY = 5056, 1e-3, 0.1


def check_dropout(recording: Recording) -> Comparison:
    """Masks bit for bit; of what they leave sums of products."""
    extent, program = extent_in_use(recording, ROWS, IN_USE), Program(recording)
    a, b, d_z = normal(3, 2 * RANK, WIDTH), normal(4, 144, RANK), normal(5, ROWS, 2 * RANK)
    keys = row_keys(1, 2, [3, 4], [20, ROWS - 20])
    dropout = GroupDropout(
        P, activation(recording, keys, extent), recording.memory.constant_uniform(KEYS)
    )
    out = typed_marked(recording, "f32", extent, WIDTH)
    lora = factors_on(recording, a, b)
    dropout_input_gradient(program, typed(recording, d_z, "f32", extent), lora, dropout, out=out)
    program.run()
    expected, size = np.zeros((IN_USE, WIDTH)), np.zeros((IN_USE, WIDTH))
    for g, key in enumerate(KEYS):
        low = slice(g * RANK, (g + 1) * RANK)
        kept = mask(keys[:IN_USE], key, WIDTH, P) * scale_of(P)
        expected += kept * (d_z[:IN_USE, low].astype(np.float64) @ a[low])
        size += kept * (np.abs(d_z[:IN_USE, low]) @ np.abs(a[low]))
    found = recording.memory.read(out)
    bound = 4 * error_bound(size, 2 * RANK) + 1e-30  # where nothing is left it is 0
    return worst(compare(found[:IN_USE], expected, bound=bound), untouched(found[IN_USE:]))


def check_noise(recording: Recording) -> Comparison:
    """Hashes bit for bit; a product and a sum."""
    extent, program = extent_in_use(recording, ROWS, IN_USE), Program(recording)
    x, keys = normal(6, ROWS, WIDTH), row_keys(1, 2, [3, 4], [20, ROWS - 20])
    lengths = np.repeat([20, ROWS - 20], [20, ROWS - 20])
    tensor = activation(recording, x, extent)
    added = EmbeddingNoise(
        5.0, 1.0,
        activation(recording, keys, extent),
        activation(recording, np.zeros(ROWS, np.float32), extent),
    )  # fmt: skip
    added.write(recording.memory, keys, lengths, WIDTH)
    added.record(program, tensor)
    program.run()
    found, expected = recording.memory.read(tensor), x + noise(keys, lengths, WIDTH, 5.0)
    return worst(
        compare(found[:IN_USE], expected[:IN_USE], rtol=1e-6, atol=1e-6),
        compare(found[IN_USE:], x[IN_USE:].astype(np.float64), rtol=0.0, atol=0.0),
    )


def check_lion(recording: Recording) -> Comparison:
    """Three steps of a rate each, whatever the gradient's size."""
    start, memory, program = normal(20, N), recording.memory, Program(recording)
    p, g, m = (memory.upload(x) for x in (start, *np.zeros((2, N), np.float32)))
    state, words = memory.upload(np.array([1, 1, 1, 0], np.float32)), memory.uniform()
    lion(program, LionTensors(p, g, m), state, words, BETAS, DECAY)
    reference = LionReference(start, DECAY)
    for t in range(1, 4):
        values = normal(20 + t, N)
        memory.write(g, values)
        memory.write(words, step_words(RATE, t, BETAS))
        program.run()
        update = reference.step(values, RATE)
        # The sign of what cancels is a matter of rounding: none of these does.
        assert np.abs(update).min() > 1e-7
    return worst(
        compare(memory.read(p), reference.p, rtol=1e-6, atol=1e-7),
        compare(memory.read(m), reference.m, rtol=1e-5, atol=1e-7),
    )


def check_adamw_8bit(recording: Recording) -> Comparison:
    """Two steps: in the second the first's codes are read. One code in a thousand may differ."""
    start, memory, program = normal(20, N), recording.memory, Program(recording)
    p, g = memory.upload(start), memory.upload(np.zeros(N, np.float32))
    moments, words = Moments8.allocate(recording, N), memory.uniform()
    state = memory.upload(np.array([1, 1, 1, 0], np.float32))
    settings = AdamWSettings(BETAS, EPSILON, DECAY)
    adamw_8bit(program, p, g, moments, (state, words), settings)
    reference, found = AdamW8Reference(start, DECAY), []
    for t in range(1, 3):
        values = normal(20 + t, N)
        memory.write(g, values)
        memory.write(words, step_words(RATE, t, BETAS))
        program.run()
        reference.step(values, RATE)
        for which, tensor in enumerate((moments.first, moments.second)):
            codes = memory.read(tensor).view(np.uint8).astype(np.int64)
            others = codes != reference.codes[which]
            found.append(compare(np.array([others.mean()]), np.zeros(1), atol=1e-3))
            reference.codes[which] = codes
        found.append(compare(memory.read(moments.scales).T, np.array(reference.scales), rtol=1e-5))
        found.append(compare(memory.read(p), reference.p, rtol=1e-6, atol=2e-7))
    return worst(*found)


CHECKS = [
    Check("dropout_input_gradient", f"{ROWS}x{WIDTH}", check_dropout, as_cpu=True),
    Check("dropout_input_gradient", f"{ROWS}x{WIDTH}", partial(check_dropout)),
    Check("embedding_noise", f"{ROWS}x{WIDTH}", check_noise),
    Check("lion", f"{N}", check_lion),
    Check("adamw_8bit", f"{N}", check_adamw_8bit),
]
