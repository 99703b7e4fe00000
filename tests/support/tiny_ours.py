"""The tiny models on our side: logits of every position, loss and gradients of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora.config.schema import Config
from lora.data.batches import make_batch
from lora.data.examples import Example
from lora.shaders.device import Device
from lora.training.programs import loss_weight_words, record_eval
from lora.training.session import TrainingSession
from tests.support.tiny_model import LENGTHS, TinyModel


@dataclass(frozen=True)
class OurGradients:
    """What one micro-batch of all sequences gives."""

    loss: float  # mean over the trained tokens
    gradients: dict[str, np.ndarray]  # of A and B by PEFT's tensor names


def open_session(
    model: TinyModel,
    gguf_path: Path,
    adapter: Path,
    *,
    device: Device | None = None,
    **train: object,
) -> TrainingSession:
    """A training session on a tiny model's GGUF and PEFT adapter; all sequences are one batch."""
    rows = [np.array(row, np.int32) for row in model.token_rows()]
    config = Config.model_validate(
        {
            "model": {"path": str(gguf_path)},
            "adapter": {
                "rank": model.rank,
                "alpha": model.alpha,
                "layers": model.layers or "all",
                "targets": model.targets,
                "init_from": str(adapter),
                "peft_layers": "model.layers",  # the judge is a class for text
            },
            "data": {"train": "none", "max_length": max(LENGTHS), "shuffle": False},
            "train": {"steps": 1, "batch_size": len(rows), "precision": "f32", **train},
            "output": "none",
        }
    )
    examples = [Example(row, np.arange(len(row)) > 0, i) for i, row in enumerate(rows)]
    return TrainingSession(config, examples=examples, device=device)


def logits(session: TrainingSession, *, adapted: bool) -> np.ndarray:
    """Logits of all positions of all sequences, f32 [tokens, vocab_size].

    Through the evaluation program with a target on every row: all of them fit one chunk of the
    head, whose logits are then still there.
    """
    batch = make_batch(session.workload.train_examples)
    session.inputs.write(
        session.device.memory,
        batch.token_ids,
        batch.positions,
        batch.segment_start,
        batch.segment_end,
        np.zeros(batch.rows, np.int32),
    )
    assert len(session.inputs.chunks) == 1
    session._programs.prefix.run()
    record_eval(
        session._recording,
        session.model,
        session.inputs,
        session._act,
        session.layout,
        session.adapter.parameters if adapted else None,
    ).run()
    values = session.device.memory.read(session._act.head.logits)
    return values[: batch.rows, : session.model.architecture.vocab_size]


def gradients(session: TrainingSession) -> OurGradients:
    """The loss of one micro-batch and its gradients, without the optimizer's part of a step."""
    programs = session._programs.training
    assert programs is not None
    batch = make_batch(session.workload.train_examples)
    words = loss_weight_words(batch.n_trained, programs.loss_scale)
    session.device.memory.write(programs.loss_weight, words)
    programs.begin.run()
    session._enter(batch, None)
    programs.micro_batch.run()
    loss = float(session.device.memory.read(session._act.loss_sum)[0]) / batch.n_trained
    flat = sum(
        session.device.memory.read(part).astype(np.float64) for part in session.adapter.gradients
    )
    tensors = {}
    flat = np.asarray(flat) / programs.loss_scale
    for path, (a, b) in session.layout.to_modules(flat).items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.{path}.lora_B.weight"] = b
    return OurGradients(loss, tensors)
