"""A mixer that is added from outside: a file and a row in each table (CONTRIBUTING.md)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora.backward.blocks import BLOCKS_BACKWARD
from lora.forward.decoder.blocks import BLOCKS
from lora.forward.model.layer_spec import GatedFeedForward, LayerSpec
from lora.forward.model.weights import FrozenMatrix
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.layer_models import RANK, SCALE, Pass, as_gpu, model_of, record_text
from tests.support.token_shift import BLOCK, BLOCK_BACKWARD, TokenShift

WIDTH, SHARE, EPSILON = 32, 0.5, 1e-5
STARTS = (0, 5, 12)  # of two examples
SPEC = LayerSpec(
    mixer=TokenShift(WIDTH, SHARE), feed_forward=GatedFeedForward(64, "silu", fused_modules=False),
    hidden_size=WIDTH, norm_epsilon=EPSILON, post_norms=False, biases=frozenset(),
)  # fmt: skip


@pytest.fixture(autouse=True)
def rows_of_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCKS, TokenShift, BLOCK)  # type: ignore[arg-type]
    monkeypatch.setitem(BLOCKS_BACKWARD, TokenShift, BLOCK_BACKWARD)  # type: ignore[arg-type]


def decoded(recording: Recording, matrix: FrozenMatrix) -> np.ndarray:
    return np.concatenate(
        [recording.memory.read(part.words).view(np.float32) for part in matrix.parts]
    ).astype(np.float64)


def reference(
    recording: Recording, one: Pass, flat: np.ndarray, x: np.ndarray, starts: tuple[int, ...]
) -> np.ndarray:
    """The layer in float64, f64 [rows, WIDTH]."""
    layer = one.model.layers[0]
    modules = one.layout.to_modules(flat)

    def adapted(group: str) -> np.ndarray:
        w = decoded(recording, layer.matrices[group])
        members = SPEC.groups[group]
        changes = [modules[m.peft_path(0)] for m in members]
        return w + np.concatenate([SCALE * b.astype(float) @ a.astype(float) for a, b in changes])

    def norm(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return values / np.sqrt((values**2).mean(-1, keepdims=True) + EPSILON) * weight

    h = norm(x, recording.memory.read(layer.mixer_norm.weight))
    before = np.concatenate([np.zeros((1, WIDTH)), h[:-1]])
    before[list(starts[:-1])] = 0
    x = x + (h + SHARE * before) @ adapted("mix").T
    h = norm(x, recording.memory.read(layer.feed_forward_norm.weight))
    gate, up = np.split(h @ adapted("gate_up").T, 2, axis=1)
    return x + gate / (1 + np.exp(-gate)) * up @ adapted("down").T


def test_training(recording: Recording) -> None:
    one, rng, rows = Pass.record(recording, SPEC), np.random.default_rng(0), STARTS[-1]
    segments = [STARTS[:2]] * STARTS[1] + [STARTS[1:]] * (rows - STARTS[1])
    bounds = np.array(segments).T
    one.inputs.write(recording.memory, np.zeros(rows, int), np.zeros(rows, int), *bounds,
                     np.zeros(rows, int))  # fmt: skip
    x, d_out, by = (rng.normal(size=(rows, WIDTH)) for _ in range(3))
    flat = one.layout.initial(0)
    modules = {
        name: (a, rng.normal(0, 0.2, b.shape).astype(np.float32))
        for name, (a, b) in one.layout.to_modules(flat).items()
    }
    flat = one.layout.from_modules(modules)
    for tensor, values in ((one.parameters, flat), (one.x, x), (one.d_x, d_out)):
        recording.memory.write(tensor, values.astype(np.float32))
    one.forward.run()
    found = recording.memory.read(one.out)
    np.testing.assert_allclose(found, reference(recording, one, flat, x, STARTS), rtol=0, atol=2e-5)
    one.backward.run()
    step = 1e-6
    moved = rng.normal(size=flat.shape) * (flat != 0)

    def change(in_x: float, in_flat: float) -> float:
        ends = [
            reference(recording, one, flat + s * in_flat * moved, x + s * in_x * by, STARTS)
            for s in (step, -step)
        ]
        return float((d_out * (ends[0] - ends[1])).sum() / (2 * step))

    d_x, d_flat = recording.memory.read(one.d_x), recording.memory.read(one.gradients)
    assert float((d_x * by).sum()) == pytest.approx(change(1, 0), rel=1e-4)
    assert float((d_flat * moved).sum()) == pytest.approx(change(0, 1), rel=1e-4)
    assert one.layout.padded_rank == RANK


@pytest.mark.parametrize("gpu", [False, True], ids=["kernels of CPU devices", "of GPUs"])
def test_text(recording: Recording, gpu: bool) -> None:
    """A piece of a prompt and then one token after the other, as all rows at once."""
    where = as_gpu(recording) if gpu else recording
    model, tokens = model_of(where, SPEC), np.random.default_rng(1).integers(0, 64, 9).tolist()
    piece, inputs, step = record_text(where, model, 6)
    inputs.write(where.memory, tokens[:6], 0, 0)
    piece.run()
    found = [*where.memory.read(step.act.x)]
    row, inputs, of_row = record_text(where, model, 1)
    carry = Program(where)
    carry.copy(step.caches[0], of_row.caches[0])
    carry.run()
    for position in range(6, 9):
        inputs.write(where.memory, [tokens[position]], position, position)
        row.run()
        found.append(where.memory.read(of_row.act.x)[0])
    one = replace(Pass.record(where, SPEC), model=model)
    x = decoded(where, model.embedding)[tokens]
    nothing = np.zeros(one.layout.size, np.float32)
    expected = reference(where, one, nothing, x, (0, 9))
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=2e-5)
