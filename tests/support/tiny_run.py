"""A whole run on a tiny model: config, GGUF and data in a temporary directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.support.tiny_gguf import write_tiny_llama

TYPES = {"weight": "Q4_1", "token_embd.weight": "Q8_0", "norm.weight": "F32"}


def write_run(folder: Path, n_rows: int = 10, **sections: dict[str, Any]) -> Path:
    """Writes model.gguf, train.jsonl, eval.jsonl and config.yaml; returns the config's path.

    Args:
        n_rows: training rows.
        sections: keys to put over the defaults here, by section.
    """
    write_tiny_llama(folder / "model.gguf", n_layers=3, types=TYPES)
    rows = [
        {"prompt": f"say {'ab' * (1 + i % 4)} ", "completion": f"{'ba' * (1 + i % 3)}!"}
        for i in range(n_rows + 3)
    ]
    for name, part in (("train", rows[:n_rows]), ("eval", rows[n_rows:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text)
    config: dict[str, Any] = {
        "model": {"path": str(folder / "model.gguf")},
        "adapter": {"rank": 3, "alpha": 6},
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "max_length": 32,
        },
        "train": {
            "epochs": 2,
            "batch_size": 3,
            "learning_rate": 0.02,
            "warmup_ratio": 0.0,
            "eval_at_start": False,
        },
        "output": str(folder / "run"),
    }
    for section, values in sections.items():
        config[section] |= values
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
