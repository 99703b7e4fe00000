"""Eight steps with an option on both sides: ours, and PEFT's in PyTorch, from one adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora.config.schema import Config
from lora.data.batches import make_batch
from lora.data.examples import Example
from lora.training.session import TrainingSession
from tests.support.tiny_model import LENGTHS, TinyModel

STEPS, RATE = 8, 2e-3


@dataclass
class Run:
    """What eight steps gave.

    Attributes:
        losses: of each step.
        gradients: of each step, by PEFT's tensor names, before clipping.
        final: A and B, and what else is trained, by the same names.
    """

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, np.ndarray]] = field(default_factory=list)
    final: dict[str, np.ndarray] = field(default_factory=dict)


def config_of(
    model: TinyModel, gguf: Path, source: Path | None, **sections: dict[str, Any]
) -> Config:
    """Of a session whose steps are given batches."""
    return Config.model_validate(
        {
            "model": {"path": str(gguf)},
            "adapter": {
                "rank": model.rank,
                "alpha": model.alpha,
                "layers": model.layers or "all",
                "targets": model.targets,
                "peft_layers": "model.layers",
                **({} if source is None else {"init_from": str(source)}),
                **sections.get("adapter", {}),
            },
            "data": {"train": "none", "max_length": max(LENGTHS), "shuffle": False},
            "train": {
                "steps": STEPS,
                "batch_size": len(LENGTHS),
                "learning_rate": RATE,
                "schedule": "constant",
                "warmup_ratio": 0.0,
                "max_grad_norm": None,
                "tuning": "off",
                **sections.get("train", {}),
            },
            "output": "none",
        }
    )


def examples_of(model: TinyModel) -> list[Example]:
    """All sequences, every token trained."""
    rows = [np.array(row, np.int32) for row in model.token_rows()]
    return [Example(row, np.arange(len(row)) > 0, i) for i, row in enumerate(rows)]


def named(session: TrainingSession, flat: np.ndarray) -> dict[str, np.ndarray]:
    """A flat array by PEFT's tensor names."""
    tensors = {}
    for path, (a, b) in session.layout.to_modules(flat).items():
        of, weight = ("embedding_", "") if path == "model.embed_tokens" else ("", ".weight")
        tensors[f"base_model.model.{path}.lora_{of}A{weight}"] = a
        tensors[f"base_model.model.{path}.lora_{of}B{weight}"] = b
    for path, magnitude in session.layout.magnitudes(flat).items():
        tensors[f"base_model.model.{path}.lora_magnitude_vector.weight"] = magnitude
    if session.layout.tokens:
        where = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
        tensors[where] = session.layout.trained_tokens(flat)
    return tensors


def run_ours(config: Config, examples: list[Example]) -> Run:
    """Eight steps over one micro-batch of all examples."""
    run = Run()
    with TrainingSession(config, examples=examples) as session:
        scale = session._training().loss_scale
        for _ in range(STEPS):
            session.step([make_batch(examples)])
            flat = session.memory.read(session.adapter.gradients[0]) / scale
            run.gradients.append(named(session, flat))
        run.losses = [metrics.loss for metrics in session.finished_steps(wait=True)]
        run.final = named(session, session.parameters())
    return run


def peft_of(model: TinyModel, adapter: Path, **settings: Any) -> Any:
    """The tiny model under PEFT, trainable, with changes of the adapter's settings."""
    from peft import PeftModel

    from tests.support.tiny_judge import build

    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return PeftModel.from_pretrained(build(model), adapter, is_trainable=True).train()


def mean_loss(net: Any, rows: list[list[int]], *_: Any) -> Any:
    """The mean cross-entropy over the shifted tokens of all rows, one row at a time."""
    import torch

    n_targets = sum(len(row) - 1 for row in rows)
    parts = []
    for row in rows:
        ids = torch.tensor([row])
        parts.append(net(input_ids=ids, labels=ids).loss * ((len(row) - 1) / n_targets))
    return sum(parts)


def run_theirs(
    net: Any,
    rows: list[list[int]],
    optimizer: Any = None,
    loss_of: Callable[..., Any] = mean_loss,
) -> Run:
    """Eight steps of PyTorch.

    Args:
        optimizer: by default AdamW over all that is trainable, with our rate.
        loss_of: (net, rows, step) → the loss.
    """
    import torch

    parameters = {n: p for n, p in net.named_parameters() if p.requires_grad}
    if optimizer is None:
        optimizer = torch.optim.AdamW(parameters.values(), lr=RATE, weight_decay=0.0)
    run = Run()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(net, rows, step)
        loss.backward()
        run.losses.append(float(loss.detach()))
        run.gradients.append({_plain(n): p.grad.numpy().copy() for n, p in parameters.items()})
        optimizer.step()
    run.final = {_plain(n): p.detach().numpy().copy() for n, p in parameters.items()}
    return run


def _plain(name: str) -> str:
    return name.replace(".default", "")


def assert_alike(ours: Run, theirs: Run, tolerance: float = 1e-4) -> None:
    """Losses and gradients of all steps within a share of the largest."""
    assert len(ours.losses) == len(theirs.losses) == STEPS
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=tolerance)
    worst = 0.0
    for step, (mine, other) in enumerate(zip(ours.gradients, theirs.gradients, strict=True)):
        assert set(mine) == set(other)
        largest = max(float(np.abs(value).max()) for value in other.values())
        for name, value in other.items():
            error = float(np.abs(mine[name] - value).max()) / largest
            worst = max(worst, error)
            assert error < tolerance, f"step {step}, {name}: {error:.2g} of the largest"
    print(f"losses {ours.losses[0]:.5f} to {ours.losses[-1]:.5f}; gradients differ by {worst:.1e}")
