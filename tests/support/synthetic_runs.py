"""Training runs over synthetic models: their config, their sequences, their losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora.config.schema import Config
from lora.data.examples import Example
from lora.forward.gguf.file import GGUFFile
from lora.forward.model.architecture import Architecture
from lora.training.session import TrainingSession

RANK, ALPHA = 16, 32.0


def run_config(
    model: Path,
    *,
    batch_size: int,
    length: int,
    steps: int,
    precision: str = "f32",
    recompute: str = "off",
    learning_rate: float = 1e-4,
) -> Config:
    """LoRA of all linear layers at a constant rate, on sequences of one length, in their order."""
    return Config.model_validate(
        {
            "model": {"path": str(model)},
            "adapter": {"rank": RANK, "alpha": ALPHA},
            "data": {"train": "none", "max_length": length, "shuffle": False},
            "train": {
                "steps": steps,
                "batch_size": batch_size,
                "learning_rate": learning_rate,
                "schedule": "constant",
                "warmup_ratio": 0.0,
                "recompute": recompute,
                "precision": precision,
            },
            "output": "none",
        }
    )


def as_examples(sequences: Sequence[np.ndarray]) -> list[Example]:
    """Sequences of token ids as examples of which every token but the first is trained."""
    return [Example(ids, np.arange(len(ids)) > 0, i) for i, ids in enumerate(sequences)]


def random_sequences(vocab_size: int, n: int, length: int, seed: int = 0) -> list[np.ndarray]:
    """Sequences of random tokens, int32 [length] each."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab_size, length).astype(np.int32) for _ in range(n)]


def repeating_sequences(vocab_size: int, n: int, length: int, seed: int = 0) -> list[np.ndarray]:
    """Sequences with something to learn: each repeats a random one of 8 tokens out of 16."""
    rng = np.random.default_rng(seed)
    alphabet = rng.choice(np.arange(3, vocab_size), 16, replace=False).astype(np.int32)
    return [np.resize(rng.choice(alphabet, 8), length) for _ in range(n)]


def loss_curves(
    model_path: Path,
    steps: int,
    precisions: list[str],
    *,
    batch_size: int = 4,
    length: int = 64,
    learning_rate: float = 1e-3,
) -> dict[str, list[float]]:
    """The losses of training in several precisions, from one start on the same batches.

    The sequences repeat short random ones of a few tokens: the loss falls from the first steps.

    Returns:
        For each precision the loss of each step.
    """
    vocab_size = Architecture.from_gguf(GGUFFile(model_path)).vocab_size
    examples = as_examples(repeating_sequences(vocab_size, batch_size * steps, length))
    curves = {}
    for precision in precisions:
        config = run_config(
            model_path,
            batch_size=batch_size,
            length=length,
            steps=steps,
            precision=precision,
            learning_rate=learning_rate,
        )
        with TrainingSession(config, examples=examples) as session:
            curves[precision] = [metrics.loss for metrics in session.train()]
    return curves


def largest_difference(values: list[float], reference: list[float]) -> float:
    """The largest relative difference over the steps that both have."""
    n = min(len(values), len(reference))
    ours, theirs = np.array(values[:n]), np.array(reference[:n])
    return float(np.max(np.abs(ours - theirs) / np.abs(theirs)))
