"""Rows of the embedding in a step: their gradient is the loss's, whatever the head is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.config.schema import Config
from lora.data.batches import make_batch
from lora.data.examples import Example
from lora.forward.decoder import head
from lora.shaders.device import Device
from lora.shaders.errors import InputError
from lora.training.session import TrainingSession
from tests.support.tiny_gguf import write_tiny_llama

TOKENS = [7, 319, 12]
ROWS = [[7, 40, 12, 7, 8, 90], [33, 12, 12, 61]]


def opened(
    folder: Path, device: Device, examples: list[Example] | None = None, **train: Any
) -> tuple[TrainingSession, list[Example]]:
    """A session whose embedding is its head."""
    path = folder / "base.gguf"
    if not path.exists():
        write_tiny_llama(path, n_layers=2, types={"weight": "Q8_0"})
    config = Config.model_validate(
        {
            "model": {"path": str(path)},
            "adapter": {
                "rank": 2, "layers": [1], "targets": ["down_proj"], "trainable_tokens": TOKENS,
            },
            "data": {"train": "none", "max_length": 8, "shuffle": False},
            "train": {"steps": 8, "batch_size": 2, "learning_rate": 0.01, "tuning": "off",
                      "schedule": "constant", "max_grad_norm": None, **train},
            "output": "none",
        }
    )  # fmt: skip
    examples = examples or [
        Example(np.array(row, np.int32), np.arange(len(row)) > 0, i) for i, row in enumerate(ROWS)
    ]
    return TrainingSession(config, examples=examples, device=device), examples


def test_the_gradient_is_the_loss_s(tmp_path: Path, device: Device) -> None:
    """Along itself, by central differences of the loss: f32's 1e-7 of it over steps of 1e-2."""
    session, examples = opened(tmp_path, device)
    with session:
        start = session.parameters()
        session.step([make_batch(examples)])
        gradient = session.memory.read(session.adapter.gradients[0])
        layout = session.layout
        n = 3 * layout.architecture.hidden_size
        for row in range(3):
            own = np.zeros_like(gradient)
            layout.trained_tokens(own)[row] = layout.trained_tokens(gradient)[row]
            size = float(np.linalg.norm(own))
            losses = []
            for sign in (1, -1):
                session.set_parameters(start + np.float32(sign * 1e-2 / size) * own)
                losses.append(session.evaluate(examples).loss)
            assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(size, rel=5e-3)
        assert layout.trained_tokens(gradient).all()  # as head the one that stands nowhere, too
        assert not gradient[n : layout.groups[0].a_start].any()  # what pads them


def test_only_named_rows_move_and_the_bare_model_stays(tmp_path: Path, device: Device) -> None:
    session, examples = opened(tmp_path, device)
    with session:
        bare, start = session.evaluate(examples, adapted=False).loss, session.parameters()
        assert session.evaluate(examples).loss == pytest.approx(bare, rel=1e-6)
        for _ in range(8):
            session.step([make_batch(examples)])
        moved = session.layout.trained_tokens(session.parameters() - start)
        assert (np.abs(moved).max(axis=1) > 0.02).all()
        assert session.evaluate(examples).loss < bare - 0.1
        assert session.evaluate(examples, adapted=False).loss == bare


def test_chunks_of_logits_add_up(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 64 rows each, the last one with few in use: the gradient is that of all at once."""
    rng, found = np.random.default_rng(0), []
    rows = [np.array([*TOKENS, *rng.integers(3, 300, 5)], np.int32) for _ in range(10)]
    examples = [Example(row, np.arange(8) > 0, i) for i, row in enumerate(rows)]
    for most in (128, 64):
        monkeypatch.setattr(head, "CHUNK_BYTES", 1)
        monkeypatch.setattr(head, "CHUNK_ROWS", most)
        with opened(tmp_path, device, examples, batch_size=10)[0] as session:
            assert len(session.inputs.chunks) == 128 // most
            session.step([make_batch(examples)])
            found.append(session.memory.read(session.adapter.gradients[0]))
    whole, apart = found
    assert np.abs(whole - apart).max() < 1e-5 * np.abs(whole).max()


def test_a_prefix_with_trained_rows_is_not_kept(tmp_path: Path, device: Device) -> None:
    session, _ = opened(tmp_path, device)
    with session:
        assert session._cache is None
    with pytest.raises(InputError, match="the embeddings are trained"):
        opened(tmp_path, device, reuse_frozen_prefix="on")


def test_f16_trains_them_alike(tmp_path: Path, device: Device) -> None:
    """The rows are f32; products with them are as the others."""
    losses = {}
    for precision in ("f32", "f16"):
        session, examples = opened(tmp_path, device, precision=precision)
        with session:
            for _ in range(8):
                session.step([make_batch(examples)])
            losses[precision] = [metrics.loss for metrics in session.finished_steps(wait=True)]
    np.testing.assert_allclose(losses["f16"], losses["f32"], rtol=2e-3)
    assert losses["f16"] != losses["f32"]
