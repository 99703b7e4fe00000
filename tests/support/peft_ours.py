"""The same eight steps on our side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora.config.schema import Config
from lora.data.batches import make_batch
from lora.data.examples import Example
from lora.training.session import TrainingSession
from tests.support.peft_reference import (
    ALPHA,
    BETAS,
    EPSILON,
    LEARNING_RATE,
    MAX_NORM,
    RANK,
    WEIGHT_DECAY,
    token_ids,
)


@dataclass(frozen=True)
class OurRun:
    """What our eight steps gave, and the session that made them."""

    losses: list[float]
    grad_norms: list[float]
    initial: dict[str, np.ndarray]
    final: dict[str, np.ndarray]  # A and B by PEFT's tensor names
    eval_losses: list[float]
    session: TrainingSession


def run_ours(model: Path, adapter: Path, **train: object) -> OurRun:
    """Eight steps from a PEFT adapter directory, a text each, every token trained."""
    ids = token_ids(model)
    rows = [np.array(row, np.int32) for row in (*ids["train"], *ids["eval"])]
    examples = [Example(row, np.arange(len(row)) > 0, i) for i, row in enumerate(rows)]
    n_train = len(ids["train"])
    config = Config.model_validate(
        {
            "model": {"path": str(model)},
            "adapter": {"rank": RANK, "alpha": ALPHA, "init_from": str(adapter)},
            "data": {"train": "none", "max_length": max(map(len, rows)), "shuffle": False},
            "train": {
                "steps": n_train,
                "batch_size": 1,
                "learning_rate": LEARNING_RATE,
                "schedule": "constant",
                "warmup_ratio": 0.0,
                "betas": list(BETAS),
                "epsilon": EPSILON,
                "weight_decay": WEIGHT_DECAY,
                "max_grad_norm": MAX_NORM,
                **train,
            },
            "output": "none",
        }
    )
    session = TrainingSession(config, examples=examples)
    initial = tensors_of(session)
    metrics = []
    for example in examples[:n_train]:
        session.step([make_batch([example])])
        metrics += session.finished_steps()
    metrics += session.finished_steps(wait=True)
    return OurRun(
        [m.loss for m in metrics],
        [m.grad_norm for m in metrics],
        initial,
        tensors_of(session),
        [session.evaluate([example]).loss for example in examples[n_train:]],
        session,
    )


def tensors_of(session: TrainingSession) -> dict[str, np.ndarray]:
    """The session's A and B by PEFT's tensor names."""
    tensors = {}
    for path, (a, b) in session.layout.to_modules(session.parameters()).items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.{path}.lora_B.weight"] = b
    return tensors
