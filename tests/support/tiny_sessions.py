"""The programs of small models' sessions, as a kind of device would record them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora.config.schema import Config
from lora.data.examples import Example
from lora.shaders.program import Dispatch
from lora.training.device_state import Seams, SessionPlan
from lora.training.workload import Workload
from tests.support.renderings import Kind

_LENGTHS = (30, 11)  # of the sequences that are a micro-batch


def micro_batch(
    path: Path, kind: Kind, adapter: Mapping[str, Any], seams: Seams | None = None, **train: Any
) -> list[Dispatch]:
    """The kernels of a micro-batch.

    Args:
        path: of the model.
        adapter, train: sections of the config.
        seams: those of the session; None for the usual ones.
    """
    config = Config.model_validate(
        {
            "model": {"path": str(path)},
            "adapter": {"rank": 8, **adapter},
            "data": {"train": "none", "max_length": max(_LENGTHS), "shuffle": False},
            "train": {"steps": 1, "batch_size": len(_LENGTHS), "tuning": "off", **train},
            "output": "none",
        }
    )
    rng = np.random.default_rng(0)
    examples = [
        Example(rng.integers(3, 300, n).astype(np.int32), np.arange(n) > 0, i)
        for i, n in enumerate(_LENGTHS)
    ]
    workload = Workload.open(config, train=True, examples=examples)
    training = SessionPlan.of(kind.facts, workload, seams=seams).programs.training
    assert training is not None
    return training.micro_batch.dispatches
