"""A loss that reads log-probabilities: its weights, and gradients that are its derivatives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lora.backward.losses import LossTensors, SupervisedLoss
from lora.config.schema import load_config
from lora.data.batches import Batch, make_batch
from lora.data.examples import Example
from lora.shaders.device import Device
from lora.shaders.program import Program
from lora.training.programs import loss_weight_words, record_eval
from lora.training.session import TrainingSession
from tests.support.tiny_run import write_run

SQUARED = """
struct Extent { rows: u32 }
struct Scale { value: f32 }
@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<uniform> scale: Scale;
@group(0) @binding(2) var<storage, read> losses: array<f32>;
@group(0) @binding(3) var<storage, read_write> weights: array<f32>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) at: vec3<u32>) {
    if (at.x < extent.rows) { weights[at.x] = scale.value * losses[at.x]; }
}
"""


class SquaredLoss:
    """Half the square of each token's cross-entropy, whose derivative is that cross-entropy."""

    reads_losses = True

    def record(self, program: Program, tensors: LossTensors) -> None:
        targets = tensors.inputs.targets
        used = [targets.uniform, tensors.scale, tensors.losses, tensors.weights]
        program.dispatch_wgsl("squared", SQUARED, used, -(-targets.maximum // 64))


class WrittenOutLoss(SquaredLoss):
    """The supervised loss, but asked for after all log-probabilities."""

    def record(self, program: Program, tensors: LossTensors) -> None:
        SupervisedLoss().record(program, tensors)


EXAMPLES = [
    Example(np.random.default_rng(i).integers(5, 250, 31).astype(np.int32), np.arange(31) > i, i)
    for i in range(5)
]


@pytest.fixture(params=[64, 1024], ids=["three chunks", "one chunk"])
def n_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of the head's logits, 145 targets in all."""
    monkeypatch.setattr("lora.forward.decoder.head.CHUNK_BYTES", 1)
    monkeypatch.setattr("lora.forward.decoder.head.CHUNK_ROWS", request.param)
    return 3 if request.param == 64 else 1


def open_session(folder: Path, device: Device, loss: SquaredLoss | None) -> TrainingSession:
    adapter = {"targets": ["q_proj", "down_proj", "lm_head"], "rank": 4}
    train = {"batch_size": 5, "learning_rate": 1e-30, "tuning": "off"}
    config = load_config(str(write_run(folder, adapter=adapter, train=train)))
    session = TrainingSession(config, examples=EXAMPLES, device=device, loss=loss)
    rng = np.random.default_rng(5)
    modules = session.layout.to_modules(session.parameters())
    for _, b in modules.values():
        b[:] = rng.normal(size=b.shape) * 0.1
    device.memory.write(session.adapter.parameters, session.layout.from_modules(modules))
    return session


def gradient_of(session: TrainingSession, batch: Batch) -> np.ndarray:
    session.step([batch])
    session.finished_steps(wait=True)
    slices = session.adapter.gradients[:1]  # which holds their sum after the step
    return session.device.memory.read(slices[0]).astype(np.float64)


def losses_at(session: TrainingSession, flat: np.ndarray, batch: Batch) -> np.ndarray:
    """The losses of all targets under other parameters, in float64."""
    memory, act = session.device.memory, session._act
    memory.write(session.adapter.parameters, flat.astype(np.float32))
    session._enter(batch, None)
    record_eval(
        session._recording, session.model, session.inputs, act, session.layout,
        session.adapter.parameters,
    ).run()  # fmt: skip
    return memory.read(act.head.losses)[: batch.n_trained].astype(np.float64)


def test_the_gradient_is_the_slope_of_the_loss(
    tmp_path: Path, device: Device, n_chunks: int
) -> None:
    with open_session(tmp_path, device, SquaredLoss()) as session:
        assert len(session.inputs.chunks) == n_chunks
        batch = make_batch(EXAMPLES)
        flat = session.parameters().astype(np.float64)
        gradient = gradient_of(session, batch)
        norm = np.linalg.norm(gradient)

        def loss(distance: float) -> float:
            found = losses_at(session, flat + distance * gradient / norm, batch)
            return float((found**2).sum()) / 2 / batch.n_trained

        # As in test_session.py: f32 losses of about 6 carry 1e-6.
        assert (loss(0.02) - loss(-0.02)) / 0.04 == pytest.approx(norm, rel=5e-3)


def test_the_weights_are_those_of_the_loss(tmp_path: Path, device: Device, n_chunks: int) -> None:
    """And the loss that is told stays the cross-entropy."""
    with open_session(tmp_path, device, SquaredLoss()) as session:
        batch, training = make_batch(EXAMPLES), session._programs.training
        assert training is not None
        session.step([batch])
        (metrics,) = session.finished_steps(wait=True)
        expected = losses_at(session, session.parameters(), batch)
        (squared,) = [d for d in training.micro_batch.dispatches if d.template == "squared"]
        weights = device.memory.read(squared.tensors[3])[: batch.n_trained]
        scale = loss_weight_words(batch.n_trained).view(np.float32)[0]
        np.testing.assert_allclose(weights, scale * expected, rtol=1e-6)
        assert metrics.loss == pytest.approx(expected.mean(), rel=1e-6)


def test_log_probabilities_first_change_no_bit(
    tmp_path: Path, device: Device, n_chunks: int
) -> None:
    """Logits that are computed twice, or kept, give the supervised gradient to the last bit."""
    found = []
    for loss in (None, WrittenOutLoss()):
        with open_session(tmp_path, device, loss) as session:
            found.append(gradient_of(session, make_batch(EXAMPLES)).tobytes())
    assert found[0] == found[1]
